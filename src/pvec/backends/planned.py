"""Answers that a run should hold: planned without weights, generated only where missing.

Extraction, evaluation and screening all state which answers they need (``PlannedResponse``), and
``generate_missing`` fills the run. An answer's id covers everything that could change it, so a
second call repeats nothing and changing a setting invalidates cached answers.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from pvec.backends.kept_means import answers
from pvec.backends.session import ModelSession
from pvec.errors import ModelError
from pvec.models.chat import answer_text, encode_prompt, think_length
from pvec.models.template import render_prompt
from pvec.runs.responses import Json, ResponseRecord, response_id
from pvec.runs.store import Run
from pvec.types import LIMITS, Generation, Instruction, Message, Progress, Request, Sampling

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedResponse:
    """One answer that a run should hold. ``condition`` is its case in the workflow."""

    trait: str
    condition: Mapping[str, Json]
    question: str
    question_id: str
    system: str | None
    prompt: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    engine: str
    """Identity of model and backend (``ModelSession.identity``)."""
    steering: tuple[Instruction, ...] = ()
    labels: Mapping[str, Json] = field(default_factory=dict)
    """Stored with the condition but no part of the id: they follow from what is."""

    @cached_property
    def id(self) -> str:
        """The response id; two workflows share the same answer under the same condition."""
        return response_id(
            model=self.engine,
            prompt_ids=self.prompt_ids,
            sampling=self.sampling,
            steering=self.steering,
            engine=self.engine,
            context={"trait": self.trait, "condition": dict(self.condition)},
        )

    def request(self) -> Request:
        """Return the backend's request for this answer."""
        return Request(
            id=self.id,
            prompt_ids=self.prompt_ids,
            sampling=self.sampling,
            steering=self.steering,
        )


class PromptCache:
    """Renders and tokenises chats, each once: rollouts and conditions share their prompts."""

    def __init__(self, session: ModelSession) -> None:
        self._session = session
        self._known: dict[tuple[tuple[str, str], ...], tuple[str, tuple[int, ...]]] = {}

    def __call__(self, messages: Sequence[Message]) -> tuple[str, tuple[int, ...]]:
        """Return prompt text and token ids. Raises ``ModelError`` when no answer fits after it."""
        key = tuple((message["role"], message["content"]) for message in messages)
        if key not in self._known:
            tokenizer = self._session.metadata.tokenizer
            text = render_prompt(tokenizer, messages, thinking=self._session.thinking)
            ids = encode_prompt(tokenizer, text)
            context = self._session.metadata.context
            if context is not None and len(ids) >= context:
                raise ModelError(
                    f"The prompt for {messages[-1]['content'][:60]!r} has {len(ids)} tokens and "
                    f"the model reads at most {context}: shorten it or choose another model."
                )
            self._known[key] = (text, ids)
        return self._known[key]


def question_messages(question: str, *, system: str | None) -> list[Message]:
    """Return the chat that asks one question, with a system prompt or without."""
    head: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*head, {"role": "user", "content": question}]


def derive_seed(base: int, *parts: str | int) -> int:
    """Return a seed below 2^48 for one answer from the run's seed and the answer's place in it.

    Leave out of ``parts`` what should be compared under common random numbers.
    """
    text = "|".join(map(str, (base, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])


def missing(run: Run, planned: Sequence[PlannedResponse]) -> list[PlannedResponse]:
    """Return those answers that the run does not hold yet."""
    have = run.response_ids()
    return [response for response in planned if response.id not in have]


def generate_missing(
    run: Run,
    session: ModelSession,
    planned: Sequence[PlannedResponse],
    *,
    on_progress: OnProgress,
    stage: str = "generate",
) -> int:
    """Generate what the run does not hold yet, appending each answer as it finishes.

    Returns the number generated. The model is loaded only when something is missing.
    """
    todo = {response.id: response for response in missing(run, planned)}
    if not todo:
        return 0
    backend = session.backend
    already, done = len(planned) - len(todo), 0
    backend.on_progress = _Watch(on_progress, stage=stage, already=already, total=len(planned))
    failures: list[str] = []
    for record in generate_records(session, list(todo.values())):
        run.append_response(record)
        done += 1
        if record.finish_reason == "failed":
            failures.append(record.detail)
    if failures:
        session.notify(
            f"{len(failures)} of {done} answers failed and are not scored ({failures[0]})"
        )
    if done != len(todo):
        raise ModelError(
            f"The backend returned {done} of {len(todo)} answers: run the same command again to "
            f"make the missing ones, and report this as a bug if it happens again."
        )
    return done


def generate_records(
    session: ModelSession, planned: Sequence[PlannedResponse]
) -> Iterator[ResponseRecord]:
    """Generate these answers and yield each as it finishes."""
    by_id = {response.id: response for response in planned}
    for generation in answers(session, [response.request() for response in by_id.values()]):
        yield _record(by_id[generation.id], generation, session)


class _Watch:
    """Turns a backend's progress into the run's: answers that were there before count as done."""

    def __init__(self, show: OnProgress, *, stage: str, already: int, total: int) -> None:
        self._show = show
        self._stage = stage
        self._already = already
        self._total = total
        self._started = time.monotonic()
        self(Progress(stage=stage, done=0, total=total))

    def __call__(self, progress: Progress) -> None:
        detail = ""
        if seconds := time.monotonic() - self._started:
            tokens, rows = (progress.extra.get(name, 0.0) for name in ("tokens", "rows"))
            detail = f"{tokens / seconds:,.0f} tokens/s, {rows:.0f} at once" if tokens else ""
            if tokens and (workers := progress.extra.get("workers")):
                detail += f" on {workers:.0f} workers"
        done = self._already + progress.done
        self._show(
            Progress(stage=self._stage, done=done, total=self._total, unit="answers", detail=detail)
        )


def _record(
    planned: PlannedResponse, generation: Generation, session: ModelSession
) -> ResponseRecord:
    tokenizer = session.metadata.tokenizer
    think = think_length(tokenizer, generation.token_ids, prompt_ids=planned.prompt_ids)
    return ResponseRecord(
        id=planned.id,
        trait=planned.trait,
        condition={**planned.condition, **planned.labels},
        question=planned.question,
        question_id=planned.question_id,
        system=planned.system,
        prompt=planned.prompt,
        prompt_ids=planned.prompt_ids,
        token_ids=generation.token_ids,
        answer=answer_text(tokenizer, generation.token_ids, think) if think else generation.text,
        finish_reason=generation.finish_reason,
        sampling=planned.sampling,
        think_tokens=think,
        steering=tuple(i.describe() for i in planned.steering),
        detail=generation.detail,
        limited=_limited(planned, generation),
    )


def _limited(planned: PlannedResponse, generation: Generation) -> tuple[int, ...]:
    if generation.limited is None:
        return ()
    pairs = zip(planned.steering, generation.touched, strict=True)
    return generation.limited, sum(count for i, count in pairs if i.operator in LIMITS)
