"""Requests and sequences as engine requests, checked first, and engine results as answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from pvec.activations.batching import prompt_length
from pvec.backends.base import NOT_FINITE
from pvec.backends.vllm.slots import Segments, cut
from pvec.backends.vllm.token_rows import OPEN_END
from pvec.errors import InputError, ModelError, SteeringError
from pvec.settings.sections import VLLMSettings
from pvec.steering.positions import expected_touched
from pvec.steering.tables import check_instruction, clamps_needed
from pvec.types import (
    Generation,
    Instruction,
    ModelInfo,
    Request,
    SpanMeans,
    SpanName,
    StreamChunk,
    TokenSpans,
)

Adapters = Mapping[str, str | None]
"""LoRA adapter folder by request id; None is the bare model."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EngineRequest:
    """One request to the engine.

    ``steered_prompt`` is the number of tokens that are prompt to the steering; ``sampling`` are
    arguments of vLLM's ``SamplingParams``; ``tag`` is the caller's own; ``stream`` asks for what
    there is after every step.
    """

    tag: Any
    token_ids: Sequence[int]
    steered_prompt: int
    sampling: Mapping[str, Any]
    plan: tuple[Instruction, ...] = ()
    segments: Segments | None = None
    adapter: str | None = None
    stream: bool = False


class End(Enum):
    """What follows the last request."""

    END = "end"


END = End.END
Drawn = EngineRequest | End | None
"""What a stream of requests gives: one, its end, or None where none has arrived yet."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EngineResult:
    """A finished request, or with ``finished`` False the tokens so far of a streamed one.

    ``high`` is the number of positions computed or read from the cache (None for a request that
    was neither steered nor captured).

    ``sums`` float32 ``[layers, segments, H]`` and ``stats`` float32 ``[layers, segments, 2]`` (sum
    of norms, number of tokens) for layers 0 … num_layers and the covered segments.
    """

    request: EngineRequest
    token_ids: tuple[int, ...]
    stopped: bool = False
    logprobs: Sequence[Any] | None = None
    high: int | None = None
    sums: np.ndarray | None = None
    stats: np.ndarray | None = None
    finished: bool = True


@dataclass(kw_only=True, eq=False)
class RequestBuilder:
    """Translates to the engine and back.

    ``context`` is the most tokens of prompt and answer together, ``vocab`` the number of token ids,
    ``stop_ids`` the tokens that end an answer, ``info.adapter`` what requests get by default.
    """

    info: ModelInfo
    options: VLLMSettings
    tokenizer: Any
    context: int
    vocab: int
    stop_ids: Sequence[int]
    truncated: int = 0
    """Requests whose answers have less room than they ask for."""

    def for_request(
        self,
        request: Request,
        *,
        adapters: Adapters | None = None,
        capture: bool = False,
        stream: bool = False,
    ) -> EngineRequest:
        """Return the engine request for a request; raises ``ModelError`` or ``InputError``."""
        self.check_ids(request.id, request.prompt_ids, room=2 if capture else 1)
        self.check_plan(request.steering)
        prompt, sampling = len(request.prompt_ids), request.sampling
        # The last sampled token is never run: one more is asked for so that all of a cut answer is.
        limit = self._limit(request, capture=capture)
        self.truncated += limit < sampling.max_tokens
        return EngineRequest(
            tag=request,
            token_ids=request.prompt_ids,
            steered_prompt=prompt,
            sampling={
                "temperature": sampling.temperature,
                "top_p": sampling.top_p if sampling.temperature > 0 else 1.0,
                "seed": sampling.seed % 2**63 if sampling.temperature > 0 else None,
                "max_tokens": limit + 1 if capture else limit,
                "stop_token_ids": list(self.stop_ids),
                "ignore_eos": True,
                # of the sampled token alone: it tells whether the logits are finite
                "logprobs": 0 if request.steering else None,
            },
            plan=request.steering,
            segments=cut(answer_spans(prompt)) if capture else None,
            adapter=self._adapter_of(request, adapters),
            stream=stream,
        )

    def for_sequence(self, sequence: TokenSpans) -> EngineRequest:
        """Return the engine request that captures given tokens; raises as ``for_request`` does."""
        self.check_ids(sequence.id, sequence.token_ids, room=1)
        self.check_plan(sequence.steering)
        for name, (start, stop) in sequence.spans.items():
            if not 0 <= start <= stop <= len(sequence.token_ids):
                raise InputError(
                    f"The {name} span {start}..{stop} of {sequence.id!r} lies outside its "
                    f"{len(sequence.token_ids)} tokens."
                )
        return EngineRequest(
            tag=sequence,
            token_ids=sequence.token_ids,
            steered_prompt=prompt_length(sequence),
            sampling={"temperature": 0.0, "max_tokens": 1, "ignore_eos": True},
            plan=sequence.steering,
            segments=cut(sequence.spans),
            adapter=self.info.adapter,
        )

    def overflow(self, request: Request) -> Generation | None:
        """Return the failed answer to a request that adds more than the number format holds.

        It must not run: numbers that are not finite stay in the engine's cache and reach others.
        """
        if not adds_too_much(request.steering, dtype=self.info.dtype):
            return None
        return Generation(
            id=request.id,
            token_ids=(),
            text="",
            finish_reason="failed",
            touched=(0,) * len(request.steering),
            detail=NOT_FINITE.format(0),
        )

    def answer(self, result: EngineResult) -> Generation:
        """Return the answer to a request; ``SteeringError`` when not all of it was steered."""
        request: Request = result.request.tag
        sampled = len(result.token_ids)
        limit = self._limit(request, capture=result.request.segments is not None)
        tokens = result.token_ids[:-1] if result.stopped else result.token_ids
        stopped = result.stopped and sampled <= limit
        tokens = tokens[:limit]
        due = len(request.prompt_ids) + sampled - 1
        if result.high is not None and not self._right(result.high, due):
            raise wrong_count(request.id, result.high, due)
        return Generation(
            id=request.id,
            token_ids=tokens,
            text=str(self.tokenizer.decode(list(tokens), skip_special_tokens=True)),
            finish_reason="stop" if stopped else "length",
            touched=tuple(
                expected_touched(
                    instruction.positions,
                    prompt_tokens=len(request.prompt_ids),
                    generated_tokens=sampled - 1,
                )
                for instruction in request.steering
            ),
        )

    def chunk(self, result: EngineResult) -> StreamChunk:
        """Return how far a streamed answer is."""
        if not result.finished:
            return StreamChunk(id=result.request.tag.id, token_ids=result.token_ids)
        answer = self.answer(result)
        return StreamChunk(id=answer.id, token_ids=answer.token_ids, finished=answer)

    def check_ids(self, identity: str, token_ids: Sequence[int], *, room: int) -> None:
        """Raise ``ModelError`` unless the tokens are the model's and leave ``room`` more."""
        if not token_ids:
            raise ModelError(f"The prompt of {identity!r} is empty: give it at least one token.")
        if len(token_ids) + room > self.context:
            raise ModelError(
                f"The prompt of {identity!r} has {len(token_ids)} tokens and leaves no room for an "
                f"answer in the engine's context of {self.context}: shorten it, or raise "
                f"backend.vllm.max_model_len if the model allows more."
            )
        if not 0 <= min(token_ids) <= max(token_ids) < self.vocab:
            raise ModelError(
                f"The prompt of {identity!r} has a token id outside the model's vocabulary of "
                f"{self.vocab}: use the model's own tokenizer."
            )

    def check_plan(self, plan: Sequence[Instruction]) -> None:
        """Raise ``ModelError`` or ``InputError`` unless the engine can steer so."""
        if not plan:
            return
        for instruction in plan:
            check_instruction(instruction, self.info)
        if not self.options.slots:
            raise InputError(
                "This engine was started without steering: set backend.vllm.slots to 1 or more."
            )
        needed = clamps_needed(plan)
        if needed > self.options.clamps:
            raise InputError(
                f"{needed} ablate or cap instructions meet on one layer and this engine was "
                f"started for {self.options.clamps}: set backend.vllm.clamps to {needed}."
            )

    def _adapter_of(self, request: Request, adapters: Adapters | None) -> str | None:
        if adapters is None or request.id not in adapters:
            return self.info.adapter
        if adapters[request.id] is not None and not self.options.max_loras:
            raise InputError(
                "This engine was started without adapters: set backend.vllm.max_loras to the "
                "number of different ones."
            )
        return adapters[request.id]

    def _limit(self, request: Request, *, capture: bool) -> int:
        """Return the most tokens of an answer: what was asked for, or what the context leaves."""
        room = self.context - len(request.prompt_ids) - (1 if capture else 0)
        return min(request.sampling.max_tokens, room)

    def _right(self, high: int, due: int) -> bool:
        """Asynchronous scheduling runs a token more behind an answer that ended by itself."""
        return due <= high <= due + 1 if self.options.async_scheduling else high == due


def adds_too_much(plan: Sequence[Instruction], *, dtype: str) -> bool:
    """Whether a steering adds more than the number format holds."""
    import torch

    added: dict[int, float] = {}
    for instruction in plan:
        peak = float(np.abs(instruction.vector).max())
        if not (math.isfinite(peak) and math.isfinite(instruction.coef)):
            return False  # refused as an instruction
        if instruction.operator == "add":
            size = abs(instruction.coef) * peak
            added[instruction.layer] = added.get(instruction.layer, 0.0) + size
    most = torch.finfo(getattr(torch, dtype)).max / 2  # room for the residual stream
    return max(added.values(), default=0.0) > most


def not_finite(request: EngineRequest, completion: Any) -> ModelError | None:
    """Return the error for a steered request whose logits were not finite, or None.

    Such numbers stay in the engine's cache, where a later answer may meet them: the engine is
    spoiled.
    """
    chosen = zip(completion.token_ids, completion.logprobs or (), strict=False)
    if not request.plan or all(math.isfinite(entry[token].logprob) for token, entry in chosen):
        return None
    return ModelError(
        f"The logits of {request.tag.id!r} are not finite numbers, which vLLM may carry into other "
        f"answers: what was finished before is kept; leave out the strongest coefficients, or use "
        f"--backend hf, where such an answer fails alone."
    )


def span_means(
    result: EngineResult, layers: tuple[int, ...], *, identity: str, hidden_size: int
) -> SpanMeans:
    """Put segments together to spans and divide by the number of tokens, which is checked."""
    segments = result.request.segments
    assert segments is not None, "the request captured"
    index = {k: i for i, k in enumerate(segments.covered)}
    means: dict[SpanName, np.ndarray] = {}
    norms: dict[SpanName, np.ndarray] = {}
    if result.sums is not None and result.stats is not None and result.high is not None:
        due = [segments.lengths(result.high)[k] for k in segments.covered]
        if not (result.stats[:, :, 1] == due).all():
            raise wrong_count(identity, int(result.stats[:, :, 1].sum(axis=1).min()), sum(due))
    for name, parts in segments.members.items():
        chosen = [index[k] for k in parts]
        if not chosen or result.sums is None or result.stats is None:
            means[name] = np.full((len(layers), hidden_size), np.nan, dtype=np.float32)
            norms[name] = np.full(len(layers), np.nan, dtype=np.float32)
            continue
        sums = result.sums[list(layers)][:, chosen].sum(axis=1, dtype=np.float64)  # [L, H]
        stats = result.stats[list(layers)][:, chosen].sum(axis=1, dtype=np.float64)  # [L, 2]
        with np.errstate(invalid="ignore", divide="ignore"):
            means[name] = (sums / stats[:, 1:]).astype(np.float32)
            norms[name] = (stats[:, 0] / stats[:, 1]).astype(np.float32)
    return SpanMeans(id=identity, layers=layers, means=means, norms=norms)


def unknown_means(identity: str, layers: tuple[int, ...], *, hidden_size: int) -> SpanMeans:
    """Return the means (NaN) of an answer that was not run."""
    names = tuple(answer_spans(1))
    return SpanMeans(
        id=identity,
        layers=layers,
        means={n: np.full((len(layers), hidden_size), np.nan, dtype=np.float32) for n in names},
        norms={n: np.full(len(layers), np.nan, dtype=np.float32) for n in names},
    )


def answer_spans(prompt: int) -> dict[SpanName, tuple[int, int]]:
    """Return the spans of an answer whose length is not known yet."""
    return {
        "prompt": (0, prompt),
        "prompt_last": (prompt - 1, prompt),
        "response": (prompt, OPEN_END),
    }


def wrong_count(identity: str, seen: int, due: int) -> SteeringError:
    """Return the error for tokens that did not go past pvec as they should."""
    return SteeringError(
        f"The vLLM engine ran {seen} tokens of {identity!r} past pvec where {due} were due: "
        f"steering or capture did not apply, use --backend hf."
    )
