"""Which rows make a step, and how they are divided into forward passes. Pure planning.

Every step's rows are drawn at random, the same ones whatever the layout and however many processes
share the work. Within a step rows go by length through the forward passes, many short ones or a few
long ones in each: the loss of a step is the mean over its tokens, so this changes nothing but the
padding.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise

from pvec.errors import InputError

PASS_COST = 256
"""What a forward and backward pass costs by itself, in tokens: many tiny passes are slow."""

CPU_PASS_COST = 64
"""The same on a CPU, where a pass starts at once but its tokens take long."""

_SAMPLED_STEPS = 64
_SAMPLED_ROWS = 2048
"""Steps and rows of the data on which the number of passes is chosen."""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How a step's rows are computed: in ``passes`` forward passes on each process."""

    size: int
    passes: int
    processes: int
    steps_per_epoch: int
    padding: float
    """Share of the computed tokens that is padding."""
    most_tokens: int
    """Tokens of the largest pass, padding included, if the longest rows meet in one step."""
    order: StepOrder
    """The rows of every pass."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the rows of a step are divided among forward passes."""

    by_length: bool = True
    """Sorted by length, or as drawn."""
    padded: bool = True
    """Side by side with padding, or one after another."""
    micro: int | None = None
    """Rows of every pass; None: split by length."""
    most_tokens: int = 16384
    """Limit of a pass, unless micro says its rows; a single longer row is let through."""

    def ordered(self, rows: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Return the rows of a step in the order in which they are divided."""
        return sorted(rows, key=lambda i: (-lengths[i], i)) if self.by_length else list(rows)

    def tokens(self, lengths: Sequence[int]) -> int:
        """Return how many tokens a pass over rows of these lengths computes."""
        return max(lengths) * len(lengths) if self.padded else sum(lengths)

    def divided(self, lengths: Sequence[int], groups: int) -> list[slice]:
        """Return the rows of each of ``groups`` passes, none empty; ``lengths`` fall."""
        n = len(lengths)
        ends = [k * n // groups for k in range(groups + 1)]
        if not self.micro:
            ends = next((e for e in self.divisions(lengths) if len(e) == len(ends)), ends)
        return [slice(a, b) for a, b in pairwise(ends)]

    def divisions(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yield where passes end: as few as the limit allows, then one more each time.

        The next is made by the split that saves most. ``lengths`` fall; the first end is 0.
        """
        ends = [0]
        for stop in range(2, len(lengths) + 1):
            if self.tokens(lengths[ends[-1] : stop]) > self.most_tokens and stop - ends[-1] > 1:
                ends.append(stop - 1)
        ends.append(len(lengths))
        while True:
            yield ends
            splits = [
                (self.cost(lengths[a:b]) - self.cost(lengths[a:m]) - self.cost(lengths[m:b]), m)
                for a, b in pairwise(ends)
                for m in range(a + 1, b)
            ]
            if not splits:
                return
            ends = sorted([*ends, max(splits)[1]])

    def cost(self, lengths: Sequence[int]) -> float:
        """Return what a pass over rows of these lengths costs, in tokens.

        Rows one after another attend over one another, which counts a little, so that equal shares
        are preferred.
        """
        tokens = self.tokens(lengths)
        return tokens if self.padded else tokens + tokens**2 / self.most_tokens


class StepOrder:
    """The rows of every forward pass of an epoch; a batch sampler for the Trainer.

    Every step has the same number of passes but the last, which may have fewer. With several
    processes the passes go round: each gets its share of every step, of about equal cost.
    ``start_epoch`` is not called ``set_epoch``: some loaders that wrap a sampler would not call it.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        size: int,
        layout: Layout,
        passes: int = 1,
        processes: int = 1,
        seed: int = 0,
    ) -> None:
        self.passes = passes
        self._lengths = lengths
        self._size = size
        self._layout = layout
        self._processes = processes
        self._seed = seed
        self._epoch = 0

    def start_epoch(self, epoch: int) -> None:
        """Say which epoch comes; each has its own order."""
        self._epoch = epoch

    def steps(self) -> Iterator[list[int]]:
        """Yield the rows of each step. A rest of fewer rows than processes joins the last step."""
        order = list(range(len(self._lengths)))
        random.Random(f"pvec-order-{self._seed}-{self._epoch}").shuffle(order)  # noqa: S311
        starts = self._starts()
        for start, stop in zip(starts, [*starts[1:], len(order)], strict=True):
            yield self._layout.ordered(order[start:stop], self._lengths)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the rows of each pass, process after process, the costliest passes first."""
        for rows in self.steps():
            lengths = [self._lengths[i] for i in rows]
            parts = self._layout.divided(lengths, self.groups(len(rows)))
            if self._layout.by_length:
                parts.sort(key=lambda part: -self._layout.tokens(lengths[part]))
            for part in parts:
                yield rows[part]

    def __len__(self) -> int:
        starts = self._starts()
        last = self.groups(len(self._lengths) - starts[-1])
        return (len(starts) - 1) * self.passes * self._processes + last

    @property
    def step_count(self) -> int:
        """Steps of an epoch."""
        return len(self._starts())

    def _starts(self) -> list[int]:
        starts = list(range(0, len(self._lengths), self._size))
        if len(starts) > 1 and len(self._lengths) - starts[-1] < self._processes:
            starts.pop()
        return starts

    def groups(self, rows: int) -> int:
        """Return how many passes, over all processes, a step of so many rows has."""
        return pass_count(
            rows, passes=self.passes, processes=self._processes, micro=self._layout.micro
        )


def pass_count(rows: int, *, passes: int, processes: int, micro: int | None) -> int:
    """Return how many passes, over all processes, a step of ``rows`` rows has."""
    most = min(passes * processes, rows)
    if micro:
        most = min(most, math.ceil(rows / micro))
    return max(1, most // processes) * processes


def plan_batches(
    lengths: Sequence[int],
    *,
    size: int,
    layout: Layout,
    processes: int = 1,
    pass_cost: int = PASS_COST,
    seed: int = 0,
) -> BatchPlan:
    """Choose in how many passes a step of ``size`` rows is computed, unless the layout says so.

    The choice computes least over the first steps of the data, counting ``pass_cost`` per pass,
    among those whose passes keep the layout's limit whatever rows are drawn. Raises ``InputError``
    when ``size`` is not a multiple of ``processes`` x ``micro``, or with fewer rows than processes.
    """
    share = _share(size, rows=len(lengths), micro=layout.micro, processes=processes)
    longest = sorted(lengths, reverse=True)[: size + processes - 1]
    if layout.micro is None and not layout.by_length:
        divisors = [m for m in range(1, share + 1) if share % m == 0]
        fitting = [m for m in divisors if m * longest[0] <= layout.most_tokens]
        layout = replace(layout, micro=max(fitting, default=1))
    order = StepOrder(lengths, size=size, layout=layout, processes=processes, seed=seed)
    count = min(_SAMPLED_STEPS, max(1, _SAMPLED_ROWS // size))
    sample = [[lengths[i] for i in rows] for rows in islice(order.steps(), count)]
    if layout.micro:
        order.passes = share // layout.micro
    else:
        order.passes = _cheapest(
            sample, longest, layout, most=share, processes=processes, pass_cost=pass_cost
        )

    def computed(rows: Sequence[int]) -> list[int]:
        return [layout.tokens(rows[part]) for part in layout.divided(rows, order.groups(len(rows)))]

    return BatchPlan(
        size=size,
        passes=order.passes,
        processes=processes,
        steps_per_epoch=order.step_count,
        padding=1 - sum(map(sum, sample)) / sum(sum(computed(rows)) for rows in sample),
        most_tokens=max(computed(longest)),
        order=order,
    )


def _share(size: int, *, rows: int, micro: int | None, processes: int) -> int:
    """Return the rows that each process has in a step; refuse what does not divide."""
    if size % processes:
        raise InputError(
            f"batch.size {size} does not divide among {processes} processes: make it a multiple."
        )
    if rows < processes:
        raise InputError(
            f"{rows} training rows do not divide among {processes} processes: start fewer."
        )
    share = size // processes
    if micro is not None and share % micro:
        raise InputError(
            f"batch.micro {micro} does not divide the {share} rows that each process has in a "
            f"step: choose a divisor."
        )
    return share


def _cheapest(
    sample: Sequence[Sequence[int]],
    longest: Sequence[int],
    layout: Layout,
    *,
    most: int,
    processes: int,
    pass_cost: int,
) -> int:
    """Return the passes per process and step that cost least, and keep the limit on any rows.

    If the longest rows of all can be divided within the limit, so can any others, row by row.
    """
    totals = [0.0] * most
    for lengths in sample:
        costs = {
            len(ends) - 1: sum(layout.cost(lengths[a:b]) for a, b in pairwise(ends))
            for ends in layout.divisions(lengths)
        }
        for number in range(most):
            groups = pass_count(len(lengths), passes=number + 1, processes=processes, micro=None)
            totals[number] += costs.get(groups, math.inf) + pass_cost * groups
    least = math.ceil((len(next(layout.divisions(longest))) - 1) / processes)
    return min(range(min(least, most), most + 1), key=lambda number: totals[number - 1])
