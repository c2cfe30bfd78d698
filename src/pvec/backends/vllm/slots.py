"""Who holds which slot of the steering tables and which rows of the accumulators.

Plain bookkeeping of the client: no vLLM and no tensors here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pvec.backends.vllm.token_rows import OPEN_END
from pvec.types import SpanName

Load = Callable[[int], None]
"""Writes a plan into the slot it is given."""


class Slots:
    """A fixed number of slots, shared by requests that are steered alike, reused when free.

    A free slot keeps its plan until another needs the place, so that a plan that comes back is
    not written again.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.loads = 0
        self._holders: dict[str, int] = {}
        self._slot_of: dict[str, int] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()  # the longest idle first

    def acquire(self, plan: str, load: Load) -> int | None:
        """Return the slot of ``plan`` for one more holder; None when every slot is held."""
        slot = self._slot_of.get(plan)
        if slot is None:
            slot = self._claim()
            if slot is None:
                return None
            load(slot)
            self.loads += 1
            self._slot_of[plan] = slot
        self._idle.pop(plan, None)
        self._holders[plan] = self._holders.get(plan, 0) + 1
        return slot

    def release(self, plan: str) -> None:
        """Give up one hold on ``plan``."""
        self._holders[plan] -= 1
        if not self._holders[plan]:
            del self._holders[plan]
            self._idle[plan] = None

    @property
    def held(self) -> int:
        """How many slots are held now."""
        return len(self._holders)

    def _claim(self) -> int | None:
        if len(self._slot_of) < self.capacity:
            return len(self._slot_of) + 1  # slots are numbered from 1; none is ever forgotten
        if not self._idle:
            return None
        oldest, _ = self._idle.popitem(last=False)
        return self._slot_of.pop(oldest)


class Rows:
    """The rows of the accumulators, from 1 on (0 is nobody's)."""

    def __init__(self, count: int) -> None:
        self.capacity = count - 1
        self._free = list(range(count - 1, 0, -1))

    def acquire(self, number: int) -> tuple[int, ...] | None:
        """Return ``number`` rows, or None when there are not so many free."""
        if len(self._free) < number:
            return None
        return tuple(self._free.pop() for _ in range(number))

    def release(self, rows: Sequence[int]) -> None:
        """Give rows back."""
        self._free.extend(rows)


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Overlapping spans of a sequence cut into segments that do not overlap.

    A token at position p lies in segment k, the number of ``edges`` that are <= p. ``covered``
    are the segments that some span needs; ``members[span]`` are those that make up the span.
    """

    edges: tuple[int, ...]
    covered: tuple[int, ...]
    members: Mapping[SpanName, tuple[int, ...]]

    def rows(self, given: Sequence[int]) -> tuple[int, ...]:
        """Return the accumulator row of every segment, 0 for those that no span needs."""
        row_of = dict(zip(self.covered, given, strict=True))
        return tuple(row_of.get(k, 0) for k in range(len(self.edges) + 1))

    def lengths(self, total: int) -> dict[int, int]:
        """Return how many tokens each covered segment has in a sequence of ``total`` tokens."""
        ends = [0, *self.edges, OPEN_END]
        return {k: max(min(ends[k + 1], total) - min(ends[k], total), 0) for k in self.covered}


def cut(spans: Mapping[SpanName, tuple[int, int]]) -> Segments:
    """Cut half-open spans into segments. Empty spans have no members."""
    full = {name: span for name, span in spans.items() if span[0] < span[1]}
    edges = tuple(sorted({end for span in full.values() for end in span}))
    members: dict[SpanName, tuple[int, ...]] = dict.fromkeys(spans, ())
    for name, (start, stop) in full.items():
        members[name] = tuple(
            k + 1 for k in range(len(edges) - 1) if start <= edges[k] and edges[k + 1] <= stop
        )
    covered = tuple(sorted({k for parts in members.values() for k in parts}))
    return Segments(edges=edges, covered=covered, members=members)
