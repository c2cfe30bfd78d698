"""The decode loop: many answers at once, each as if it ran alone.

Requests wait in a queue, longest prompts first. Rows that finish leave the batch at once and the
gap is filled from the queue, so the model always works on many rows. What several prompts begin
with is run once. Everything about a row (its draws, its steering, its counts) depends on its
request only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from pvec.backends.base import NOT_FINITE, arriving
from pvec.backends.hf.forward import CausalModel
from pvec.backends.hf.kvcache import RowCache
from pvec.backends.hf.prefill import Prefilled, Prompt, prefill
from pvec.backends.hf.probe import Probe
from pvec.backends.hf.rows import Row, admit_all, alike, shrink, take
from pvec.backends.hf.sampling import sample_tokens
from pvec.backends.hf.step import decode_step
from pvec.errors import PvecError
from pvec.models.memory import unless_out_of_memory
from pvec.steering.steerer import Steerer
from pvec.types import FinishReason, Generation, Progress, Request, StreamChunk

_REFILL_BELOW = 0.75
"""The queue is tapped when fewer rows than this share of the last full batch are left."""


def generate(
    model: CausalModel, requests: Iterable[Request], *, progress: Callable[[Progress], None]
) -> Iterator[Generation]:
    """Yield every request's answer as it finishes; see ``Backend.generate``.

    ``progress`` hears of every step: answers done, and under ``extra`` the ``tokens`` sampled so
    far and the ``rows`` running.
    """
    arrivals = arriving(requests)
    queue: deque[Row] = deque()
    batch = DecodeBatch(model)
    most = done = tokens = total = 0

    def advance() -> list[Finished]:
        nonlocal most, tokens
        if queue and len(batch.rows) <= _REFILL_BELOW * most:
            batch.extend(take(queue, batch.rows, model))
            most = len(batch.rows)
        tokens += len(batch.rows)
        return batch.step()

    while True:
        arrived = arrivals.take(wait=not (queue or batch.rows))
        if arrived:
            rows = admit_all(arrived, model)
            Steerer(model.decoder, [row.request.steering for row in rows])  # refuse before a pass
            total += len(rows)
            order = [*queue, *rows]
            queue = deque(sorted(order, key=lambda r: (-len(r.request.prompt_ids), r.shared_key)))
        if not queue and not batch.rows:
            if arrived is None:
                return
            continue
        advanced = unless_out_of_memory(advance)
        if advanced is not None or batch.ended:
            done += len(batch.ended)
            extra = {"tokens": float(tokens), "rows": float(len(batch.rows))}
            progress(Progress(stage="generate", done=done, total=total, extra=extra))
            yield from (_generation(answer, model.tokenizer) for answer in batch.ended)
        if advanced is not None:
            continue
        shrink(model, batch.rows)
        queue.extendleft(reversed(batch.rows))
        batch = DecodeBatch(model)
        most = 0


def stream(model: CausalModel, requests: Sequence[Request]) -> Iterator[StreamChunk]:
    """Yield a chunk per answer and step; see ``Backend.stream``. All requests run in one batch,
    or in a batch per prompt length where rows of different lengths cannot share a cache.
    """
    waiting = sorted(admit_all(requests, model), key=lambda row: len(row.sequence))
    batch = DecodeBatch(model)
    while waiting or batch.rows:
        if not batch.rows:
            now = [r for r in waiting if model.row_cache or alike(r, waiting[0])]
            waiting = [r for r in waiting if r not in now]
            batch.extend(now)
        running = list(batch.rows)
        ended = {id(done.row): done for done in batch.step()}
        for row in running:
            done = ended.get(id(row))
            yield StreamChunk(
                id=row.request.id,
                token_ids=tuple(row.tokens),
                finished=_generation(done, model.tokenizer) if done else None,
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Finished:
    """A row that has left the batch: why, and the positions that each instruction touched."""

    row: Row
    reason: FinishReason
    touched: tuple[int, ...]
    limited: int | None = None
    error: PvecError | None = None


def _generation(done: Finished, tokenizer: PreTrainedTokenizerBase) -> Generation:
    return Generation(
        id=done.row.request.id,
        token_ids=tuple(done.row.tokens),
        text=str(tokenizer.decode(done.row.tokens, skip_special_tokens=True)),
        finish_reason=done.reason,
        touched=done.touched,
        limited=done.limited,
        detail=NOT_FINITE.format(len(done.row.tokens)) if done.reason == "failed" else "",
    )


class DecodeBatch:
    """The rows that run now, with their cache, padding, steering and the logits to sample from."""

    def __init__(self, model: CausalModel, *, probe: Probe | None = None) -> None:
        """Start empty; ``probe`` measures every token of ``Row.projections``."""
        self.rows: list[Row] = []
        self.ended: list[Finished] = []
        """The rows that left in the latest step, also where it then ran out of memory."""
        self._model = model
        self._probe = probe
        self._run_tokens = decode_step(model)
        self._cache = model.new_cache()
        self._steerer: Steerer | None = None
        self._logits = torch.empty(0)  # [R, V]
        self._lengths: list[int] = []  # real tokens in the cache, per row

    def extend(self, rows: Sequence[Row]) -> None:
        """Add rows: run each distinct prompt once, and what prompts begin with once."""
        if not rows:
            return
        self.rows = [*self.rows, *rows]  # before anything can fail: no row gets lost
        self.ended = []
        shared: dict[object, list[Row]] = {}
        for row in rows:
            shared.setdefault(row.shared_key, []).append(row)
        groups = list(shared.values())
        prompts = [
            Prompt(
                token_ids=row.sequence,
                length=len(row.request.prompt_ids),
                steering=row.request.steering,
                thinking=row.thinking if row.tracker else (),
            )
            for row, *_ in groups
        ]
        done = prefill(self._model, prompts, probe=self._probe)
        groups = [groups[number] for number in done.order]
        for group, projections in zip(groups, done.projections, strict=self._probe is not None):
            for row in group:
                row.projections = list(projections)
        if len(rows) > len(groups):
            copies = [index for index, group in enumerate(groups) for _ in group]
            with torch.inference_mode():
                done.cache.keep(copies)
                done.logits = done.logits[copies]
            done.steerer.select(copies)
        ready = [row for group in groups for row in group]
        self._join(done, [len(row.sequence) for row in ready])
        self.rows = [*self.rows[: len(self.rows) - len(rows)], *ready]

    @torch.inference_mode()
    def _join(self, done: Prefilled, lengths: list[int]) -> None:
        if self._steerer is None or not self._lengths:
            self._cache, self._steerer, self._logits = done.cache, done.steerer, done.logits
        else:
            assert isinstance(self._cache, RowCache), "rows join a row cache only"
            assert isinstance(done.cache, RowCache), "rows join a row cache only"
            self._cache.join(done.cache, room=len(self.rows))
            self._steerer.join(done.steerer)
            self._logits = torch.cat([self._logits, done.logits])
        self._lengths = self._lengths + lengths

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        """Sample one token for every row, let finished rows go, and run the others' tokens."""
        assert self._steerer is not None
        finished: list[Finished] = []
        self.ended = finished
        sampled = sample_tokens(
            self._logits,
            [row.request.sampling for row in self.rows],
            [len(row.tokens) for row in self.rows],
        )
        # A number that is infinite or not a number reaches the maximum of its row.
        usable = torch.isfinite(self._logits.amax(dim=-1)).tolist()
        going: list[int] = []
        for index, (row, token) in enumerate(zip(self.rows, sampled, strict=True)):
            if not usable[index]:
                finished.append(self._finish(index, "failed"))
                continue
            stops = token in self._model.stop_ids
            if not stops:
                row.tokens.append(token)
            if stops or len(row.tokens) >= row.room:
                finished.append(self._finish(index, "stop" if stops else "length"))
            else:
                going.append(index)
        if finished:
            self._keep(with_holes_filled(going))
        if self.rows:
            self._run_newest()
        return finished

    def _finish(self, index: int, reason: FinishReason) -> Finished:
        assert self._steerer is not None
        row = self.rows[index]
        generated = self._lengths[index] - len(row.request.prompt_ids)
        touched = self._steerer.check_touched(
            index,
            prompt_tokens=len(row.request.prompt_ids),
            generated_tokens=generated,
            think_tokens=sum(row.thinking[: 1 + generated]),
        )
        limited = self._steerer.limited(index)
        return Finished(row=row, reason=reason, touched=touched, limited=limited)

    def _keep(self, indices: list[int]) -> None:
        self.rows = [self.rows[i] for i in indices]
        self._lengths = [self._lengths[i] for i in indices]
        if not indices or self._steerer is None:
            self._cache, self._steerer = self._model.new_cache(), None
            self._logits = torch.empty(0)
            return
        self._cache.keep(indices)
        if isinstance(self._cache, RowCache):
            self._cache.drop_columns(self._cache.columns - max(self._lengths))
        self._steerer.select(indices)

    def _run_newest(self) -> None:
        assert self._steerer is not None
        if any(row.tracker for row in self.rows):
            self._steerer.set_thinking([row.thinking[-1] for row in self.rows])
        self._logits = self._run_tokens(
            [row.tokens[-1] for row in self.rows],
            self._lengths,
            cache=self._cache,
            steerer=self._steerer,
            probe=self._probe,
        )
        if self._probe is not None:
            for row, projections in zip(self.rows, self._probe.take(), strict=True):
                row.projections.append(projections[0])
        self._lengths = [length + 1 for length in self._lengths]


def with_holes_filled(kept: list[int]) -> list[int]:
    """Reorder ascending row numbers so that few rows move: the last ones fill the holes.

    >>> with_holes_filled([0, 2, 3, 5])
    [0, 5, 2, 3]
    """
    staying = [row for row in kept if row < len(kept)]
    moving = [row for row in kept if row >= len(kept)]
    taken = set(staying)
    return [row if row in taken else moving.pop() for row in range(len(kept))]
