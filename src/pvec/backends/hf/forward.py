"""One model as the decode loops see it: a forward pass over a left-padded batch with a cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pvec.backends.hf.attention import grouped_decoding, supports_grouping
from pvec.backends.hf.kvcache import FixedCache, RowCache, StateCache
from pvec.backends.hf.probe import Probe
from pvec.errors import ModelError
from pvec.models.costs import cache_numbers
from pvec.models.decoder import Decoder, find_decoder
from pvec.models.memory import BatchLimits, limits_for
from pvec.models.template import end_of_turn
from pvec.steering.steerer import Steerer

_HEAD_BLOCK = 1536
_FEW_ROWS, _MANY_ROWS = 8, 128
"""Between these a block of the vocabulary's matrix is multiplied faster than all of it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CausalModel:
    """A loaded model with what a decode loop needs to know of it.

    ``context`` is the number of positions it can hold (None: no limit known), ``stop_ids`` are the
    tokens that end a turn.
    ``parameters`` are the names of arguments that ``inner`` takes. ``limits`` shrink when memory
    runs out. With ``fixed_shapes`` the decode loop runs steps that a GPU can replay
    (``step.FixedStep``).
    """

    inner: PreTrainedModel
    decoder: Decoder
    context: int | None
    stop_ids: frozenset[int]
    pad_id: int
    vocab_size: int
    parameters: frozenset[str]
    tokenizer: PreTrainedTokenizerBase
    limits: BatchLimits
    notify: Callable[[str], None] = lambda _: None
    """Receives a sentence for the user: a smaller batch, a shorter answer."""
    fixed_shapes: bool = False

    @property
    def config(self) -> Any:
        """The configuration of the language model itself."""
        return self.inner.config.get_text_config(decoder=True)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.decoder.device

    @property
    def row_cache(self) -> bool:
        """Whether rows of different lengths can share a cache, and join and leave it."""
        return self.decoder.keys_and_values_only

    def new_cache(self) -> RowCache | StateCache:
        """Return an empty cache: of rows that come and go, or else transformers' own.

        Raises ``ModelError`` for a model that takes neither.
        """
        if self.row_cache:
            return RowCache()
        generating: Any = type(self.inner)
        if not generating._supports_default_dynamic_cache():  # noqa: SLF001
            raise ModelError(
                f"{type(self.inner).__name__} has a cache of its own kind, with which the hf "
                f"backend cannot generate: use --backend vllm (activations can be captured)."
            )
        return StateCache(config=self.config)

    def forward(
        self,
        token_ids: torch.Tensor,
        *,
        mask: torch.Tensor | dict[str, torch.Tensor] | None,
        positions: torch.Tensor,
        cache: RowCache | StateCache | FixedCache | None,
        steerer: Steerer | None = None,
        probe: Probe | None = None,
        all_logits: bool = False,
    ) -> torch.Tensor:
        """Run ``token_ids`` ``[R, T]`` behind the cache; return float32 logits ``[R, V]``.

        The logits are those of the last token, or ``[R, T, V]`` with ``all_logits``. ``mask`` is
        ``[R, past + T]`` (None: nothing is padding), or what transformers takes ready-made. Without
        ``cache`` nothing is kept. ``probe`` measures the residual stream as it is steered.
        """
        steered = steerer.attached() if steerer is not None and steerer.active else nullcontext()
        grouped = token_ids.shape[1] == 1 and supports_grouping(self.inner)
        single = grouped_decoding(self.config) if grouped else nullcontext()
        inputs: dict[str, Any] = {"attention_mask": mask, "position_ids": positions}
        arguments = {name: value for name, value in inputs.items() if name in self.parameters}
        state = "cache_params" if "cache_params" in self.parameters else "past_key_values"
        if not all_logits and "logits_to_keep" in self.parameters:
            arguments["logits_to_keep"] = 1
        head = nullcontext() if all_logits else _fast_head(self.inner)
        measured = probe.attached() if probe is not None else nullcontext()
        with steered, measured, single, head:
            output = self.inner(
                input_ids=token_ids, use_cache=cache is not None, **{state: cache}, **arguments
            )
        logits: torch.Tensor = output.logits if all_logits else output.logits[:, -1]
        return logits.float()


@contextmanager
def _fast_head(model: PreTrainedModel) -> Iterator[None]:
    """Compute the logits of a batch's last tokens in a faster way inside the context.

    The last tokens are a view with gaps, for which torch reads the whole matrix of the vocabulary
    once for every row; and a matrix of that size is multiplied by few rows at half the rate at
    which blocks of it are.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    plain = type(head) is torch.nn.Linear and "forward" not in vars(head)  # accelerate's is there
    if not plain or head.weight.device.type != "cpu" or getattr(head, "bias", None) is not None:
        yield
        return
    head.forward = partial(_by_blocks, head.weight)
    try:
        yield
    finally:
        del head.forward


def _by_blocks(weight: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Return ``hidden`` ``[..., H]`` times the vocabulary's ``weight`` ``[V, H]``."""
    rows = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    size = _HEAD_BLOCK if _FEW_ROWS <= len(rows) <= _MANY_ROWS else len(weight)
    logits = [linear(rows, block) for block in torch.split(weight, size)]
    joined = logits[0] if len(logits) == 1 else torch.cat(logits, dim=-1)
    return joined.reshape(*hidden.shape[:-1], len(weight))


def causal_model(model: Any, tokenizer: PreTrainedTokenizerBase) -> CausalModel:
    """Describe a loaded model (PEFT wrappers included) for the decode loops."""
    inner: PreTrainedModel = model.get_base_model() if hasattr(model, "peft_config") else model
    config = inner.config.get_text_config(decoder=True)
    decoder = find_decoder(model)
    pad = tokenizer.pad_token_id or 0
    return CausalModel(
        inner=inner,
        decoder=decoder,
        context=getattr(config, "max_position_embeddings", None),
        stop_ids=stop_ids(inner, tokenizer),
        pad_id=pad if 0 <= pad < decoder.vocabulary else 0,  # masked, so any token serves
        vocab_size=config.vocab_size,
        parameters=frozenset(inspect.signature(inner.forward).parameters),
        tokenizer=tokenizer,
        limits=limits_for(
            decoder.device,
            bytes_per_token=max(cache_numbers(config) * inner.dtype.itemsize, 1),
            vocab_size=config.vocab_size,
        ),
        fixed_shapes=decoder.device.type == "cuda" and _can_fix_shapes(inner, decoder),
    )


def _can_fix_shapes(model: PreTrainedModel, decoder: Decoder) -> bool:
    """Whether a model's step depends on no value, as transformers says, and takes a ready mask."""
    attention = model.config._attn_implementation  # noqa: SLF001 - transformers' own name for it
    whole = len({parameter.device for parameter in model.parameters()}) == 1
    fixed = bool(type(model)._can_compile_fullgraph)  # noqa: SLF001 - the same
    return fixed and whole and attention == "sdpa" and decoder.keys_and_values_only


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens that end an answer: the generation config's and the tokenizer's, and the
    one with which the chat template ends an assistant's turn.
    """
    ids: set[int] = set()
    for declared in (
        getattr(model.generation_config, "eos_token_id", None),
        tokenizer.eos_token_id,
        end_of_turn(tokenizer),
    ):
        if isinstance(declared, Iterable):
            ids.update(declared)
        elif declared is not None:
            ids.add(declared)
    return frozenset(ids)


def left_padded(
    sequences: Sequence[Sequence[int]], *, pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return token ids, real-token mask and position ids, each ``[R, T]``, padded on the left."""
    width = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    real = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence, dtype=torch.long)
        real[row, width - len(sequence) :] = True
    positions = (real.long().cumsum(dim=1) - 1).clamp(min=0)
    return ids.to(device), real.to(device), positions.to(device)
