"""``PoolBackend``: the contract of ``pvec.backends.base`` on many workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np

from pvec.backends.base import Backend
from pvec.backends.pool.cluster import model_order, pool_for
from pvec.backends.pool.jobs import Job, Method, Numbered
from pvec.backends.pool.members import WorkerDied
from pvec.backends.pool.pool import Pool
from pvec.backends.pool.scheduler import Failed, Item, Schedule
from pvec.backends.pool.worker import ModelOrder
from pvec.errors import ModelError, PvecError
from pvec.models.files import ModelSpec
from pvec.models.load import ModelMetadata, inspect_model
from pvec.settings import Settings
from pvec.types import (
    Divergence,
    Generation,
    Progress,
    Request,
    SpanMeans,
    StreamChunk,
    TokenSpans,
)


class PoolBackend(Backend):
    """One model in every worker of a pool.

    Results are those of one worker, whatever their number and whoever dies: a request carries its
    seed and its steering. The pool is held until ``close``.
    """

    def __init__(
        self,
        pool: Pool,
        order: ModelOrder,
        *,
        metadata: ModelMetadata,
        retries: int = 3,
    ) -> None:
        """Load the model in every worker; ``ModelError`` or ``InputError`` where one cannot."""
        self.pool = pool.hold()
        self.key = order.key
        self.retries = retries
        self.tokenizer = metadata.tokenizer
        try:
            self._opened = pool.open(order)
        except BaseException:
            self.close()
            raise
        self.info = self._opened.info

    @classmethod
    def from_settings(
        cls,
        spec: ModelSpec,
        settings: Settings,
        *,
        metadata: ModelMetadata | None = None,
        on_note: Callable[[str], None] | None = None,
        on_load: Callable[[Progress], None] | None = None,  # noqa: ARG003 - workers report none
    ) -> Self:
        """Load the model in the workers that the settings ask for; see ``Backend.from_settings``.

        The workers' backend is ``settings.backend.name``, ``auto`` being transformers.
        """
        metadata = metadata or inspect_model(spec)
        with pool_for(settings, notify=on_note) as pool:
            order = model_order(spec, settings, fingerprint=metadata.fingerprint)
            return cls(pool, order, metadata=metadata, retries=settings.pool.retries)

    @property
    def rows_at_once(self) -> int:
        """How many answers all workers together have room for."""
        return self._opened.rows * len(self.pool.members)

    @property
    def workers(self) -> list[str]:
        """The workers, as messages name them."""
        return [member.label for member in self.pool.members]

    def generate(self, requests: Iterable[Request]) -> Iterator[Generation]:
        """Yield one ``Generation`` per request as it finishes; see ``Backend.generate``.

        An answer that workers do not survive, even alone, has failed, with the reason.
        """
        return _results(self._run("generate", _by_id(requests), failed=_failed_answer))

    @property
    def captures_while_generating(self) -> bool:
        """Whether the workers' backends do."""
        return self._opened.captures_while_generating

    def generate_and_capture(
        self, requests: Iterable[Request], *, layers: Sequence[int] | None = None
    ) -> Iterator[tuple[Generation, SpanMeans]]:
        """Yield every answer with its span means; see ``Backend.generate_and_capture``."""
        if not self.captures_while_generating:
            return super().generate_and_capture(requests, layers=layers)
        return _results(self._run("generate_and_capture", _by_id(requests), layers=layers))

    def stream(self, requests: Iterable[Request]) -> Iterator[StreamChunk]:
        """Yield chunks of a few requests; see ``Backend.stream``.

        An answer whose worker dies begins again elsewhere; its chunks go on where they were.
        """
        seen: dict[str, int] = {}
        chunks = self._run("stream", _by_id(requests), unfinished=lambda c: c.finished is None)
        for _, chunk in chunks:
            if chunk.finished or len(chunk.token_ids) > seen.get(chunk.id, 0):
                seen[chunk.id] = len(chunk.token_ids)
                yield chunk

    def capture(
        self,
        sequences: Iterable[TokenSpans],
        *,
        layers: Sequence[int] | None = None,
        directions: np.ndarray | None = None,
    ) -> Iterator[SpanMeans]:
        """Yield the span means of each sequence; see ``Backend.capture``."""
        return _results(
            self._run("capture", _by_id(sequences), layers=layers, directions=directions)
        )

    def continuation_logprobs(
        self, prompts: Sequence[tuple[int, ...]], continuations: Sequence[tuple[int, ...]]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield ``(prompt index, logprobs)``; see ``Backend.continuation_logprobs``."""
        return self._run(
            "continuation_logprobs", enumerate(prompts), continuations=tuple(continuations)
        )

    def answer_logprobs(
        self, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield ``(pair index, logprobs)``; see ``Backend.answer_logprobs``."""
        # Neighbours go to one worker, which computes their prompt once.
        together = sorted(range(len(pairs)), key=lambda index: pairs[index][0])
        return self._run("answer_logprobs", ((i, pairs[i]) for i in together))

    def divergences(
        self, reference: TokenSpans, variants: Sequence[TokenSpans]
    ) -> Iterator[Divergence]:
        """Yield the ``Divergence`` of each variant; see ``Backend.divergences``."""
        return _results(self._run("divergences", _by_id(variants), reference=reference))

    def map(
        self, function: Callable[[Backend, Any], Any], items: Sequence[Any]
    ) -> Iterator[tuple[int, Any]]:
        """Yield ``(index, function(backend, item))`` of each item, on whichever worker is free.

        ``function`` is found by its name in its module, and its results must be picklable. It runs
        again elsewhere when its worker dies.
        """
        return self._run("map", enumerate(items), function=function)

    def on_each(self, function: Callable[..., Any], *args: Any) -> list[tuple[str, Any]]:
        """Return ``(worker, function(backend, *args))`` for every worker that has the model."""
        members = self.pool.all_ready(self.key)
        asked = [m.handle.submit("call", self.key, function, *args) for m in members]
        answers: list[tuple[str, Any]] = []
        for member, future in zip(members, asked, strict=True):
            try:
                answer = future.result()
            except WorkerDied as death:
                raise ModelError(
                    f"{member.label} died ({death}): run the same command again."
                ) from None
            if isinstance(answer, PvecError):
                raise answer
            answers.append((member.label, answer))
        return answers

    def close(self) -> None:
        """Free the model in every worker, and the workers when no other model needs them."""
        self.pool.drop(self.key)
        self.pool.close()

    def _run(
        self,
        method: Method,
        items: Iterable[Numbered],
        *,
        failed: Failed | None = None,
        unfinished: Callable[[Any], bool] = lambda _: False,
        **options: Any,
    ) -> Iterator[Numbered]:
        """Yield the results of a method of the workers' backends, with the keys of their items."""
        schedule = Schedule(
            self.pool,
            Job(key=self.key, method=method, options=options),
            items,
            retries=self.retries,
            failed=failed or _refuse,
            unfinished=unfinished,
            on_progress=self._report if method in _GENERATING else _unseen,
        )
        return schedule.run()

    def _report(self, done: int, extra: Mapping[str, float]) -> None:
        self.on_progress(Progress(stage="generate", done=done, total=None, extra=extra))


_GENERATING: tuple[Method, ...] = ("generate", "generate_and_capture")
"""The methods that report to ``on_progress``."""


def _unseen(_done: int, _extra: Mapping[str, float]) -> None: ...


def _by_id(items: Iterable[Any]) -> Iterator[Numbered]:
    return ((item.id, item) for item in items)


def _results(numbered: Iterator[Numbered]) -> Iterator[Any]:
    return (result for _, result in numbered)


def _failed_answer(item: Item, reason: str) -> Generation:
    return Generation(
        id=item.key, token_ids=(), text="", finish_reason="failed", detail=f"no answer: {reason}"
    )


def _refuse(item: Item, reason: str) -> Any:
    raise ModelError(
        f"{item.key!r} cannot be done: {reason}. What was finished is kept; leave this row out, or "
        f"use workers with more memory."
    )
