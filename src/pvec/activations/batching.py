"""Which sequences are computed together. Pure planning: no tensors, no model.

Rows of one forward are padded to the longest, so they are taken by length. Several answers to one
prompt need the prompt only once, and prompts that begin alike their beginning; these stand side by
side by length, without any padding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

from pvec.types import TokenSpans

_LEAST_SAVED = 64
"""Fewer saved tokens than this do not pay for the extra forward."""

_MIN_SHARED_FRACTION = 0.1
"""Attention over a cached prompt needs an explicit mask, which costs a few percent itself."""

_SHORTEST = 16
"""Common beginnings of fewer tokens are not worth a pass of their own."""

_DEEPEST = 100
"""How many beginnings may lie within each other before the search ends."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Groups of sequences to compute; those of a group begin with the same ``length`` tokens.

    All of a group have the same steering. With ``length`` 0 nothing is shared and every sequence is
    a group of its own.
    """

    length: int
    groups: list[list[TokenSpans]]


def prompt_length(sequence: TokenSpans) -> int:
    """Return how many tokens of a sequence are prompt: up to the end of its prompt span.

    Without a prompt span, up to the last prompt token or the start of the response; without any
    of these the whole sequence is prompt.
    """
    spans = sequence.spans
    for name in ("prompt", "prompt_last"):
        if name in spans and spans[name][1] > spans[name][0]:
            return spans[name][1]
    starts = [spans[name][0] for name in ("think", "response") if name in spans]
    return starts[0] if starts else len(sequence.token_ids)


def windows(sequences: Iterable[TokenSpans], *, rows: int) -> Iterator[list[TokenSpans]]:
    """Split a stream into lists of at most ``rows`` sequences, so that memory stays constant."""
    stream = iter(sequences)
    while window := list(islice(stream, rows)):
        yield window


def plan_window(window: Sequence[TokenSpans], *, share: bool) -> list[Work]:
    """Split a window into prompts to share (longest first) and, at the end, sequences as they are.

    The order within the window does not matter: equal sets of sequences give equal plans.
    """
    ordered = sorted(window, key=_order)
    groups: dict[tuple[object, ...], list[TokenSpans]] = defaultdict(list)
    for sequence in ordered if share else ():
        prompt = sequence.token_ids[: prompt_length(sequence)]
        groups[(prompt, tuple(i.fingerprint for i in sequence.steering))].append(sequence)
    by_length: dict[int, list[list[TokenSpans]]] = defaultdict(list)
    for length, group in _of_beginnings([g[0] for g in groups.values() if len(g) == 1]):
        by_length[length].append(group)
    for group in groups.values():
        if len(group) > 1 and prompt_length(group[0]) > 0:
            by_length[prompt_length(group[0])].append(group)
    shared = [
        Work(length=length, groups=by_length[length])
        for length in sorted(by_length, reverse=True)
        if _pays(by_length[length], length)
    ]
    chosen = {id(s) for work in shared for group in work.groups for s in group}
    return [*shared, Work(length=0, groups=[[s] for s in ordered if id(s) not in chosen])]


def _of_beginnings(sequences: Sequence[TokenSpans]) -> Iterator[tuple[int, list[TokenSpans]]]:
    """Yield groups whose prompts begin alike, and the length of what they share.

    What is shared ends before the last prompt token. Each of its tokens is in the same spans of all
    sequences of a group: a span that begins there is the same one and reaches further.
    """
    alike: dict[tuple[object, ...], list[TokenSpans]] = defaultdict(list)
    for sequence in sequences:
        last = prompt_length(sequence) - 1
        begun = {name: span for name, span in sequence.spans.items() if span[0] < last}
        if all(stop >= last for _, stop in begun.values()):
            starts = tuple(sorted((name, start) for name, (start, _) in begun.items()))
            alike[(starts, tuple(i.fingerprint for i in sequence.steering))].append(sequence)
    for group in alike.values():
        bodies = [sequence.token_ids[: prompt_length(sequence) - 1] for sequence in group]
        for beginning in common_beginnings(bodies):
            yield beginning.length, [group[member] for member in beginning.members]


def rows_that_fit(lengths: Sequence[int], *, token_budget: int) -> int:
    """Return how many of the first rows fit when all are padded to the longest; at least one."""
    longest = 0
    for count, length in enumerate(lengths):
        longest = max(longest, length)
        if count and (count + 1) * longest > token_budget:
            return count
    return len(lengths)


def _order(sequence: TokenSpans) -> tuple[object, ...]:
    return (-len(sequence.token_ids), sequence.token_ids, sequence.id)


def _pays(groups: Sequence[Sequence[TokenSpans]], length: int) -> bool:
    total = sum(len(s.token_ids) for group in groups for s in group)
    saved = sum((len(group) - 1) * length for group in groups)
    return saved >= _LEAST_SAVED and saved >= _MIN_SHARED_FRACTION * total


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
