"""Which rows make a step, and how they are laid out. Pure planning: no tensors, no model.

Every step's rows are drawn at random, the same ones whatever the layout and however many processes
share the work. Within a step rows go by length through the forward passes: the loss of a step is
the mean over its tokens, so this changes nothing but the padding.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pvec.errors import InputError

PASS_COST = 192
"""What a forward and backward pass costs by itself, in tokens: many tiny passes are slow."""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How a step's rows are computed: ``micro`` rows a pass, ``passes`` passes per process."""

    size: int
    micro: int
    passes: int
    steps_per_epoch: int
    padding: float
    """Share of the computed tokens that is padding."""


class StepOrder:
    """The order of row indices in an epoch; a sampler for the Trainer.

    ``start_epoch`` is not called ``set_epoch``: some loaders that wrap a sampler would not call it.
    """

    def __init__(self, lengths: Sequence[int], *, size: int, seed: int, by_length: bool) -> None:
        self._lengths = lengths
        self._size = size
        self._seed = seed
        self._by_length = by_length
        self._epoch = 0

    def start_epoch(self, epoch: int) -> None:
        """Say which epoch comes; each has its own order."""
        self._epoch = epoch

    def steps(self) -> Iterator[list[int]]:
        """Yield the rows of each step, the longest first when they go by length."""
        order = list(range(len(self._lengths)))
        random.Random(f"pvec-order-{self._seed}-{self._epoch}").shuffle(order)  # noqa: S311
        for start in range(0, len(order), self._size):
            rows = order[start : start + self._size]
            yield sorted(rows, key=lambda i: (-self._lengths[i], i)) if self._by_length else rows

    def __iter__(self) -> Iterator[int]:
        for rows in self.steps():
            yield from rows

    def __len__(self) -> int:
        return len(self._lengths)


def plan_batches(
    lengths: Sequence[int],
    *,
    size: int,
    micro: int | None,
    most_tokens: int,
    processes: int = 1,
    by_length: bool = True,
    padded: bool = True,
    seed: int = 0,
) -> BatchPlan:
    """Choose how many rows go through one pass, unless ``micro`` says so.

    The choice computes least over the first steps of the data, counting ``PASS_COST`` per pass,
    among those whose passes hold at most ``most_tokens``. Raises ``InputError`` when ``size`` is
    not a multiple of ``processes`` x ``micro``.
    """
    if size % processes:
        raise InputError(
            f"batch.size {size} does not divide among {processes} processes: make it a multiple."
        )
    share = size // processes
    if micro is not None and share % micro:
        raise InputError(
            f"batch.micro {micro} does not divide the {share} rows that each process has in a "
            f"step: choose a divisor."
        )
    order = StepOrder(lengths, size=size, seed=seed, by_length=by_length)
    sample = [[lengths[i] for i in rows] for rows, _ in zip(order.steps(), range(64), strict=False)]
    choices = [micro] if micro else [m for m in range(1, share + 1) if share % m == 0]

    def computed(m: int) -> int:
        return sum(_computed(rows, m, padded=padded) for rows in sample)

    def cost(m: int) -> int:
        passes = sum(math.ceil(len(rows) / m) for rows in sample)
        return computed(m) + PASS_COST * passes

    longest = max(lengths)
    fitting = [m for m in choices if m * longest <= most_tokens] or choices[:1]
    best = min(fitting, key=cost)
    real = sum(map(sum, sample))
    return BatchPlan(
        size=size,
        micro=best,
        passes=share // best,
        steps_per_epoch=math.ceil(len(lengths) / size),
        padding=1 - real / computed(best),
    )


def _computed(lengths: Sequence[int], micro: int, *, padded: bool) -> int:
    """Return how many tokens the passes of one step compute."""
    if not padded:
        return sum(lengths)
    chunks = [lengths[start : start + micro] for start in range(0, len(lengths), micro)]
    return sum(max(chunk) * len(chunk) for chunk in chunks)
