"""Unfinished answers: requests become rows, and rows wait until they fit into the batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pvec.backends.hf.forward import CausalModel
from pvec.errors import ModelError, ModelMemoryError
from pvec.models.chat import ThinkTracker
from pvec.types import BY_SPAN, Request


@dataclass(eq=False)
class Row:
    """An unfinished answer."""

    request: Request
    room: int
    tokens: list[int] = field(default_factory=list)
    projections: list[np.ndarray] = field(default_factory=list)
    """Of the last prompt token and of each answer token that was run, where a probe measures."""
    tracker: ThinkTracker | None = None
    """Knows which tokens are reasoning, for steering that depends on it."""

    @property
    def thinking(self) -> list[bool]:
        """Of the last prompt token and each token of the answer: is it reasoning, where that
        matters to the row's steering.
        """
        if self.tracker is None:
            return [False] * (1 + len(self.tokens))
        self.tracker.follow(self.tokens)
        return self.tracker.thinking

    @property
    def sequence(self) -> tuple[int, ...]:
        """Everything the model must have seen before the next token."""
        return (*self.request.prompt_ids, *self.tokens)

    @property
    def full_length(self) -> int:
        """The most tokens that prompt and answer can have."""
        return len(self.request.prompt_ids) + self.room

    @property
    def shared_key(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Rows with equal keys have equal caches."""
        return self.sequence, tuple(i.fingerprint for i in self.request.steering)


def admit(request: Request, model: CausalModel) -> Row:
    """Return the row of a request.

    Raises ``ModelError`` for a prompt that leaves no room in the context or has unknown tokens.
    """
    length, room = len(request.prompt_ids), request.sampling.max_tokens
    if length == 0:
        raise ModelError(f"The prompt of {request.id!r} is empty: give it at least one token.")
    model.decoder.check_tokens(request.prompt_ids, name=f"The prompt of {request.id!r}")
    if model.context is not None:
        if length >= model.context:
            raise ModelError(
                f"The prompt of {request.id!r} has {length} tokens and leaves no room for an "
                f"answer in the model's context of {model.context}: shorten it."
            )
        room = min(room, model.context - length)
    by_span = any(i.positions in BY_SPAN for i in request.steering)
    tracker = ThinkTracker(model.tokenizer, request.prompt_ids) if by_span else None
    return Row(request, max(room, 1), tracker=tracker)


def admit_all(requests: Sequence[Request], model: CausalModel) -> list[Row]:
    """Return a row per request; the user is told of answers that the context may shorten."""
    rows = [admit(request, model) for request in requests]
    if truncated := sum(row.room < row.request.sampling.max_tokens for row in rows):
        model.notify(
            f"{truncated} answers may be shortened: the model's context is {model.context} tokens"
        )
    return rows


def take(queue: deque[Row], running: Sequence[Row], model: CausalModel) -> list[Row]:
    """Take from the queue what fits beside the running rows; at least one row in all.

    Where rows cannot join a cache, rows of one length are taken, and only when none is running.
    """
    taken: list[Row] = []
    limits = model.limits
    longest = max((row.full_length for row in running), default=0)
    while queue:
        count = len(running) + len(taken) + 1
        longest = max(longest, queue[0].full_length)
        if count > 1 and (count > limits.rows or count * longest > limits.cached_tokens):
            break
        if not model.row_cache and (running or (taken and not alike(taken[0], queue[0]))):
            break
        taken.append(queue.popleft())
    return taken


def alike(row: Row, other: Row) -> bool:
    """Whether two rows have equal lengths, so that neither needs padding."""
    return len(row.sequence) == len(other.sequence)


def shrink(model: CausalModel, failed: Sequence[Row]) -> None:
    """Lower the limits after a batch did not fit; ``ModelMemoryError`` when it was a single row."""
    if not model.limits.halve(len(failed)):
        length = failed[0].full_length if failed else 0
        raise ModelMemoryError(
            f"There is not enough memory for one answer of up to {length} tokens: lower the "
            f"maximum tokens, or use a smaller model or dtype."
        )
    most = model.limits.rows
    model.notify(f"out of memory with {len(failed)} rows: continuing with at most {most}")
