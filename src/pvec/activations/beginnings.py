"""Which sequences begin alike, so that their beginning is computed once. Pure planning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_SHORTEST = 16
"""Common beginnings of fewer tokens are not worth a pass of their own."""

_LEAST_SAVED = 64
"""Fewer tokens saved in all do not pay for the extra forward."""

_DEEPEST = 100
"""How many beginnings may lie within each other before the search ends."""


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """The sequences ``members`` (numbers, two at least) begin with the same ``length`` tokens."""

    length: int
    members: list[int]

    @property
    def saved(self) -> int:
        """How many tokens less are computed."""
        return (len(self.members) - 1) * self.length


def common_beginnings(sequences: Sequence[tuple[int, ...]]) -> list[Beginning]:
    """Divide sequences into those that share a beginning, so that most tokens are saved.

    Sequences that share none are in no group; the order of the others follows their tokens, so that
    equal sets give equal groups.

    >>> system, other = tuple(range(20)), tuple(range(100, 170))
    >>> groups = common_beginnings([(*system, n) for n in range(9)] + [other, other])
    >>> [(group.length, group.members) for group in groups]
    [(20, [0, 1, 2, 3, 4, 5, 6, 7, 8]), (70, [9, 10])]
    """
    order = sorted(range(len(sequences)), key=lambda number: (sequences[number], number))
    common = [_common(sequences[a], sequences[b]) for a, b in pairwise(order)]
    return [
        Beginning(length=group.length, members=[order[place] for place in group.members])
        for group in _best(common, 0, len(order), depth=0)
        if group.saved >= _LEAST_SAVED
    ]


def _best(common: Sequence[int], first: int, stop: int, *, depth: int) -> list[Beginning]:
    """Return the groups of the sorted sequences ``[first, stop)`` that save most.

    Where all of them share ``length`` tokens, each run of them that shares more is either divided
    further, or its sequences join the group of that length.
    """
    if stop - first < 2:
        return []
    length = min(common[first : stop - 1])
    if depth == _DEEPEST or length == max(common[first : stop - 1]):
        whole = Beginning(length=length, members=list(range(first, stop)))
        return [whole] if length >= _SHORTEST else []
    ends = [place + 1 for place in range(first, stop - 1) if common[place] == length]
    together: list[int] = []
    groups: list[Beginning] = []
    for start, end in pairwise([first, *ends, stop]):
        inner = _best(common, start, end, depth=depth + 1)
        if length >= _SHORTEST and sum(g.saved for g in inner) < (end - start) * length:
            together += range(start, end)
        else:
            groups += inner
    if len(together) > 1:
        groups.append(Beginning(length=length, members=together))
    return groups


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Return how many tokens two sequences begin with in common."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))
