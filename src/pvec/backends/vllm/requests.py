"""Requests as jobs of the engine, checked first, and finished jobs as answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pvec.activations.batching import prompt_length
from pvec.backends.vllm.flow import Done, Job
from pvec.backends.vllm.results import answer_spans, wrong_count
from pvec.backends.vllm.slots import cut
from pvec.backends.vllm.tables import removals_needed
from pvec.errors import InputError, ModelError
from pvec.settings.tree import VLLMSettings
from pvec.steering.positions import expected_touched
from pvec.steering.tables import check_instruction
from pvec.types import Generation, Instruction, ModelInfo, Request, StreamChunk, TokenSpans

Adapters = Mapping[str, str | None]
"""LoRA adapter folder by request id; None is the bare model."""


@dataclass(kw_only=True, eq=False)
class Jobs:
    """What this engine can be asked, and in which words.

    ``context`` is the most tokens of prompt and answer together, ``vocab`` the number of token ids,
    ``stop_ids`` the tokens that end an answer, ``info.adapter`` what requests get by default.
    """

    info: ModelInfo
    options: VLLMSettings
    tokenizer: Any
    context: int
    vocab: int
    stop_ids: Sequence[int]
    cut: int = 0
    """Requests whose answers got less room than they asked for."""

    def of_request(
        self,
        request: Request,
        *,
        adapters: Adapters | None = None,
        capture: bool = False,
        stream: bool = False,
    ) -> Job:
        """Return the job that answers a request; ``ModelError`` or ``InputError`` if it cannot."""
        self.check_ids(request.id, request.prompt_ids, room=2 if capture else 1)
        self._check_plan(request.steering)
        prompt, sampling = len(request.prompt_ids), request.sampling
        # The last sampled token is never run: one more is asked for so that all of a cut answer is.
        limit = self._limit(request, capture=capture)
        self.cut += limit < sampling.max_tokens
        return Job(
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
            },
            plan=request.steering,
            segments=cut(answer_spans(prompt)) if capture else None,
            adapter=self._adapter_of(request, adapters),
            stream=stream,
        )

    def of_sequence(self, sequence: TokenSpans) -> Job:
        """Return the job that captures given tokens; raises as ``of_request`` does."""
        self.check_ids(sequence.id, sequence.token_ids, room=1)
        self._check_plan(sequence.steering)
        for name, (start, stop) in sequence.spans.items():
            if not 0 <= start <= stop <= len(sequence.token_ids):
                raise InputError(
                    f"The {name} span {start}..{stop} of {sequence.id!r} lies outside its "
                    f"{len(sequence.token_ids)} tokens."
                )
        return Job(
            tag=sequence,
            token_ids=sequence.token_ids,
            steered_prompt=prompt_length(sequence),
            sampling={"temperature": 0.0, "max_tokens": 1, "ignore_eos": True},
            plan=sequence.steering,
            segments=cut(sequence.spans),
            adapter=self.info.adapter,
        )

    def answer(self, done: Done) -> Generation:
        """Return the answer of a request's job; ``SteeringError`` when it was not all steered."""
        request: Request = done.job.tag
        sampled = len(done.token_ids)
        limit = self._limit(request, capture=done.job.segments is not None)
        tokens = done.token_ids[:-1] if done.stopped else done.token_ids
        stopped = done.stopped and sampled <= limit
        tokens = tokens[:limit]
        due = len(request.prompt_ids) + sampled - 1
        if done.high is not None and not self._right(done.high, due):
            raise wrong_count(request.id, done.high, due)
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

    def chunk(self, done: Done) -> StreamChunk:
        """Return how far a streamed answer is."""
        if not done.finished:
            return StreamChunk(id=done.job.tag.id, token_ids=done.token_ids)
        answer = self.answer(done)
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

    def _check_plan(self, plan: Sequence[Instruction]) -> None:
        if not plan:
            return
        for instruction in plan:
            check_instruction(instruction, self.info)
        if not self.options.slots:
            raise InputError(
                "This engine was started without steering: set backend.vllm.slots to 1 or more."
            )
        needed = removals_needed(plan)
        if needed > self.options.removals:
            raise InputError(
                f"{needed} ablate or cap instructions meet on one layer and this engine was "
                f"started for {self.options.removals}: set backend.vllm.removals to {needed}."
            )

    def _adapter_of(self, request: Request, adapters: Adapters | None) -> str | None:
        if adapters is None or request.id not in adapters:
            return self.info.adapter
        if adapters[request.id] is not None and not self.options.adapters:
            raise InputError(
                "This engine was started without adapters: set backend.vllm.adapters to the number "
                "of different ones."
            )
        return adapters[request.id]

    def _limit(self, request: Request, *, capture: bool) -> int:
        """Return the most tokens of an answer: what was asked for, or what the context leaves."""
        room = self.context - len(request.prompt_ids) - (1 if capture else 0)
        return min(request.sampling.max_tokens, room)

    def _right(self, high: int, due: int) -> bool:
        """Asynchronous scheduling runs a token more behind an answer that ended by itself."""
        return due <= high <= due + 1 if self.options.async_scheduling else high == due
