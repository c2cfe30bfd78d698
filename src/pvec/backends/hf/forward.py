"""One model as the decode loops see it: a forward pass over a left-padded batch with a cache."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pvec.backends.hf.attention import grouped_decoding, supports_grouping
from pvec.backends.hf.kvcache import RowCache
from pvec.errors import ModelError
from pvec.models.decoder import Decoder, find_decoder
from pvec.models.template import end_of_turn
from pvec.steering.hooks import Steerer

_KNOWN_LAYER_TYPES = frozenset(("full_attention", "sliding_attention"))


@dataclass(frozen=True, kw_only=True, eq=False)
class CausalModel:
    """A loaded model with what a decode loop needs to know of it.

    ``context`` is the number of positions it can hold (None: no limit known), ``stop_ids`` are the
    tokens that end a turn, ``bytes_per_token`` is what one position costs in the cache.
    """

    inner: PreTrainedModel
    decoder: Decoder
    context: int | None
    stop_ids: frozenset[int]
    pad_id: int
    vocab_size: int
    bytes_per_token: int
    options: dict[str, Any]

    @property
    def config(self) -> Any:
        """The configuration of the language model itself."""
        return self.inner.config.get_text_config(decoder=True)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.decoder.device

    def forward(
        self,
        token_ids: torch.Tensor,
        *,
        mask: torch.Tensor | dict[str, torch.Tensor] | None,
        positions: torch.Tensor,
        cache: RowCache,
        steerer: Steerer | None = None,
        all_logits: bool = False,
    ) -> torch.Tensor:
        """Run ``token_ids`` ``[R, T]`` behind the cache; return float32 logits ``[R, V]``.

        The logits are those of the last token, or ``[R, T, V]`` with ``all_logits``. ``mask`` is
        ``[R, past + T]`` (None: nothing is padding), or what transformers takes ready-made.
        """
        steered = steerer.attached() if steerer is not None and steerer.active else nullcontext()
        grouped = token_ids.shape[1] == 1 and supports_grouping(self.inner)
        single = grouped_decoding(self.config) if grouped else nullcontext()
        with steered, single:
            output = self.inner(
                input_ids=token_ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                **({} if all_logits else self.options),
            )
        logits: torch.Tensor = output.logits if all_logits else output.logits[:, -1]
        return logits.float()


def causal_model(model: Any, tokenizer: PreTrainedTokenizerBase) -> CausalModel:
    """Describe a loaded model (PEFT wrappers included) for the decode loops.

    Raises ``ModelError`` for layers whose state is not a key-value cache.
    """
    inner: PreTrainedModel = model.get_base_model() if hasattr(model, "peft_config") else model
    config = inner.config.get_text_config(decoder=True)
    strange = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYER_TYPES
    if strange:
        raise ModelError(
            f"{type(inner).__name__} has layers of a kind that the hf backend cannot batch "
            f"({', '.join(sorted(strange))}): use --backend vllm."
        )
    takes_keep = "logits_to_keep" in inspect.signature(inner.forward).parameters
    return CausalModel(
        inner=inner,
        decoder=find_decoder(model),
        context=getattr(config, "max_position_embeddings", None),
        stop_ids=stop_ids(inner, tokenizer),
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        vocab_size=config.vocab_size,
        bytes_per_token=_bytes_per_token(config, inner.dtype),
        options={"logits_to_keep": 1} if takes_keep else {},
    )


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


def _bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Return what keys and values of one position take; heads may differ from layer to layer."""
    layers = getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers
    numbers = 0
    for layer in layers:
        heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
        width = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        numbers += 2 * heads * width
    return int(numbers * dtype.itemsize)
