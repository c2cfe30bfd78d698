"""What a model costs to run: memory, arithmetic, bytes moved, seconds.

Sizes are read from a model that is built without memory for its weights, so that they hold for any
architecture; the rest is plain arithmetic. ``docs/scaling.md`` derives and checks it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MOST_GPUS = 64
"""GPUs among which one model is divided at most."""
TENSOR_SHARE = 0.85
"""Assumed share of their speed that GPUs keep when they compute every layer together."""
_LEAST_ROWS = 8
"""A worker whose memory holds fewer whole answers at once is given more GPUs."""
_CACHE_SHARE = 0.75
"""Share of the memory beside the weights that keys and values may take (``limits_for``)."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Numbers that a model holds and multiplies with.

    ``block_weights`` are the matrices of all blocks, ``active_weights`` those of them that meet one
    token (fewer in a mixture of experts), ``head_weights`` the matrix of the vocabulary.
    ``attention_width`` is query heads × head size and ``cache_numbers`` the keys and values of a
    token, each summed over the layers. A number takes ``itemsize`` bytes, in the matrices of the
    blocks ``block_itemsize``.
    """

    parameters: int
    block_weights: int
    active_weights: int
    head_weights: int
    attention_width: int
    cache_numbers: int
    vocabulary: int
    num_layers: int
    itemsize: int
    block_itemsize: float

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights."""
        rest = self.parameters - self.block_weights
        return self.block_weights * self.block_itemsize + rest * self.itemsize

    @property
    def cache_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return self.cache_numbers * self.itemsize

    def flops(self, tokens: float, *, keys: float, logits: float = 0) -> float:
        """Return FLOPs of a pass over ``tokens``, of which ``logits`` get logits.

        ``keys`` is the sum over the tokens of the positions that each is compared with; ``n``
        tokens behind ``past`` others make ``n · (past + n)``, as kernels that mask also compute
        what they mask.
        """
        matrices = self.active_weights * tokens + self.head_weights * logits
        return 2.0 * matrices + 4.0 * self.attention_width * keys

    def step_bytes(self, rows: int, *, context: float) -> float:
        """Return bytes read by one decode step of ``rows`` answers that stand at ``context``.

        All weights that any row meets, once (but the embedding's rows), and every row's cache.
        """
        missed = (1 - self.active_weights / self.block_weights) ** rows  # experts of no row
        blocks = self.block_weights * (1 - missed) * self.block_itemsize
        return blocks + self.head_weights * self.itemsize + rows * context * self.cache_bytes

    def rows(self, memory: float, *, context: int, most: int = 512) -> int:
        """Return how many answers of ``context`` tokens run at once in ``memory`` bytes."""
        free = _CACHE_SHARE * (memory - self.weight_bytes)
        return max(0, min(most, int(free / (context * self.cache_bytes))))

    def gpus(self, memory: float, *, context: int) -> int | None:
        """Return how many GPUs of ``memory`` bytes one worker takes: 1, 2, 4 …

        None when not even ``MOST_GPUS`` hold weights and a few answers.
        """
        count = 1
        while self.rows(count * memory, context=context) < _LEAST_ROWS:
            count *= 2
            if count > MOST_GPUS:
                return None
        return count


def model_size(
    config: PretrainedConfig, *, itemsize: int, block_itemsize: float | None = None
) -> ModelSize:
    """Return the size of the model that ``config`` describes, with ``itemsize`` bytes a number.

    ``block_itemsize`` is that of the blocks' matrices where they are quantised. Allocates nothing
    and takes a few tenths of a second.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from pvec.models.decoder import find_decoder

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    decoder = find_decoder(model)
    matrices = {
        name: weights.numel()
        for name, weights in decoder.blocks.named_parameters()
        if weights.dim() > 1
    }
    experts = sum(count for name, count in matrices.items() if ".experts." in name)
    blocks = sum(matrices.values())
    return ModelSize(
        parameters=sum(weights.numel() for weights in model.parameters()),
        block_weights=blocks,
        active_weights=round(blocks - experts * (1 - _active_share(decoder.config))),
        head_weights=model.get_output_embeddings().weight.numel(),
        attention_width=sum(heads * size for heads, _, size in _heads(decoder.config)),
        cache_numbers=cache_numbers(decoder.config),
        vocabulary=decoder.vocabulary,
        num_layers=decoder.num_layers,
        itemsize=itemsize,
        block_itemsize=block_itemsize or itemsize,
    )


def cache_numbers(config: Any) -> int:
    """Return how many numbers a token's keys and values are, over all layers."""
    return sum(2 * heads * size for _, heads, size in _heads(config))


def _heads(config: Any) -> Iterator[tuple[int, int, int]]:
    """Yield query heads, key heads and head size of every layer that has them."""
    for layer in getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers:
        queries = getattr(layer, "num_attention_heads", None)
        if queries:
            keys = getattr(layer, "num_key_value_heads", None) or queries
            yield queries, keys, getattr(layer, "head_dim", None) or layer.hidden_size // queries


def _active_share(config: Any) -> float:
    """Return the share of the experts that one token meets."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    total = next((count for name in names if (count := getattr(config, name, None))), None)
    return config.num_experts_per_tok / total if total else 1.0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What runs one worker: ``flops`` of matrix products (FLOP/s), ``bandwidth`` (bytes/s) and
    ``memory`` (bytes) of its devices together.

    A model reaches ``share`` of the first two; ``layer_seconds`` is what calling the operations of
    one layer takes in every decode step. ``origin`` says where the figures are from.
    """

    flops: float
    bandwidth: float
    memory: float
    share: float
    layer_seconds: float
    origin: str

    def divided(self, count: int, *, tensor_parallel: bool) -> Machine:
        """Return ``count`` of it that hold one model together.

        They compute every layer together (``tensor_parallel``) or one after another.
        """
        speed = count * (TENSOR_SHARE if count > 1 else 1.0) if tensor_parallel else 1.0
        return replace(
            self,
            flops=speed * self.flops,
            bandwidth=speed * self.bandwidth,
            memory=count * self.memory,
        )


@dataclass(frozen=True, kw_only=True)
class Work:
    """Tokens that a command runs through a model.

    ``prompts`` different prompts of ``prompt_tokens`` altogether are computed once; ``answers`` to
    them take ``answer_tokens`` altogether and stand behind prompts of ``context`` tokens on
    average. ``captured`` tokens are run again for their activations, ``scored`` ones for the
    logits of every token (a judge by likelihood).
    """

    prompts: int = 0
    prompt_tokens: int = 0
    answers: int = 0
    answer_tokens: int = 0
    context: float = 0.0
    captured: int = 0
    scored: int = 0

    @property
    def length(self) -> float:
        """Mean tokens of an answer."""
        return self.answer_tokens / max(self.answers, 1)

    def divided(self, workers: int) -> Work:
        """Return one worker's share."""
        counts = ("prompts", "prompt_tokens", "answers", "answer_tokens", "captured", "scored")
        return replace(self, **{name: -(-getattr(self, name) // workers) for name in counts})


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """FLOPs and seconds of a piece of work on one worker, by stage."""

    size: ModelSize
    work: Work
    machine: Machine
    most_rows: int = 512

    @cached_property
    def rows(self) -> int:
        """Answers that run at once."""
        whole = int(self.work.context + self.work.length) + 1
        fit = self.size.rows(self.machine.memory, context=whole, most=self.most_rows)
        return max(1, min(fit, self.work.answers))

    @property
    def prefill_flops(self) -> float:
        """FLOPs of all prompts, each once, with the logits of its last token."""
        work = self.work
        mean = work.prompt_tokens / max(work.prompts, 1)
        return self.size.flops(
            work.prompt_tokens, keys=work.prompt_tokens * mean, logits=work.prompts
        )

    @property
    def decode_flops(self) -> float:
        """FLOPs of all answers, token by token."""
        work = self.work
        keys = work.answer_tokens * (work.context + work.length / 2)
        return self.size.flops(work.answer_tokens, keys=keys, logits=work.answer_tokens)

    @property
    def capture_flops(self) -> float:
        """FLOPs of the blocks over what is captured, without logits."""
        return self.size.flops(self.work.captured, keys=self.work.captured * self._whole)

    @property
    def scoring_flops(self) -> float:
        """FLOPs of scoring by likelihood, with the logits of every token."""
        scored = self.work.scored
        return self.size.flops(scored, keys=scored * self._whole, logits=scored)

    @property
    def decode_seconds(self) -> float:
        """Seconds of all decode steps: reading, arithmetic and calls, one after the other."""
        machine, work = self.machine, self.work
        steps = work.answer_tokens / self.rows
        context = work.context + work.length / 2
        reading = self.size.step_bytes(self.rows, context=context) / machine.bandwidth
        calls = self.size.num_layers * machine.layer_seconds
        arithmetic = self.decode_flops / machine.flops
        return (steps * reading + arithmetic) / machine.share + steps * calls

    @property
    def seconds(self) -> float:
        """Seconds of everything on this one worker."""
        passes = self.prefill_flops + self.capture_flops + self.scoring_flops
        return passes / (self.machine.flops * self.machine.share) + self.decode_seconds

    @property
    def _whole(self) -> float:
        return self.work.context + self.work.length
