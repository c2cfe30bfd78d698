"""Padded tokens of a training step: split by length, the best possible split, TRL's grouping.

    python benchmarks/batching.py [--lengths FILE] [--size 16]

Over steps of 16 rows with lengths as in short chats, in public chat logs (log-normal) and in long
answers, or with the lengths in FILE (one number a line). Per way: forward passes of a step, padding
as a share of what is computed, and cost against the best split of the same rows. Cost is computed
tokens plus what each pass costs by itself, in tokens (``CPU_PASS_COST``, ``PASS_COST``).

- ``split``: pvec's, a step's random rows split where it saves most;
- ``best``: the split of the same rows that costs least, by dynamic programming;
- ``equal``: the same rows by length in passes of equally many rows;
- ``grouped``: transformers' ``group_by_length``, which puts rows of like length into one step, in
  passes of as many rows as cost least;
- ``as drawn``: the reference's passes of 2 rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from common import parser_of
from transformers.trainer_pt_utils import get_length_grouped_indices

from pvec.training.batches import CPU_PASS_COST, PASS_COST, Layout

STEPS = 200
LAYOUT = Layout()

Steps = list[list[int]]
Split = Callable[[Sequence[int], int], list[int]]
"""Gives the tokens of each pass of a step's falling lengths, for a number of passes."""


def samples(size: int) -> dict[str, list[int]]:
    """Return lengths like those of short chats, of public chat logs, and of long answers."""
    rng = random.Random(0)
    count = STEPS * size

    def words(mean: float, spread: float) -> int:
        return max(2, min(600, round(rng.lognormvariate(mean, spread))))

    return {
        "short chats": [8 + rng.randint(1, 12) + rng.randint(1, 12) for _ in range(count)],
        "chat logs": [20 + words(2.6, 1.5) + words(3.9, 1.0) for _ in range(count)],
        "long answers": [min(2048, round(rng.lognormvariate(5.5, 0.8))) for _ in range(count)],
    }


def split(lengths: Sequence[int], passes: int) -> list[int]:
    """Return the tokens of each pass as pvec divides the rows."""
    return [LAYOUT.tokens(lengths[part]) for part in LAYOUT.divided(lengths, passes)]


def equal(lengths: Sequence[int], passes: int) -> list[int]:
    """Return the tokens of passes of equally many rows."""
    ends = [k * len(lengths) // passes for k in range(passes + 1)]
    return [LAYOUT.tokens(lengths[a:b]) for a, b in pairwise(ends)]


def best(lengths: Sequence[int], passes: int) -> list[int]:
    """Return the tokens of each pass in the division that computes least."""
    n = len(lengths)
    least: list[list[int] | None] = [[], *[None] * n]  # of the first j rows
    for _ in range(passes):
        longer: list[list[int] | None] = [None] * (n + 1)
        for stop in range(1, n + 1):
            ways = [
                [*before, LAYOUT.tokens(lengths[start:stop])]
                for start, before in enumerate(least[:stop])
                if before is not None
            ]
            longer[stop] = min(ways, key=sum, default=None)
        least = longer
    best = least[n]
    assert best is not None
    return best


def drawn(lengths: Sequence[int], size: int) -> Steps:
    """Return steps of random rows, longest first."""
    order = random.Random(1).sample(lengths, len(lengths))
    return [sorted(order[k : k + size], reverse=True) for k in range(0, STEPS * size, size)]


def grouped(lengths: Sequence[int], size: int) -> Steps:
    """Return steps as transformers groups rows by length."""
    generator = torch.Generator().manual_seed(0)
    order = get_length_grouped_indices(list(lengths), size, generator=generator)
    return [
        sorted((lengths[i] for i in order[k : k + size]), reverse=True)
        for k in range(0, STEPS * size, size)
    ]


def cheapest(steps: Steps, way: Split, *, pass_cost: int) -> tuple[int, float, float]:
    """Return passes, padding and cost of ``way`` with the number of passes that costs least."""
    choices = []
    for passes in range(1, len(steps[0]) + 1):
        tokens = sum(sum(way(step, passes)) for step in steps)
        choices.append((tokens + pass_cost * passes * len(steps), passes, tokens))
    cost, passes, tokens = min(choices)
    return passes, 1 - sum(map(sum, steps)) / tokens, cost


def compare(name: str, lengths: Sequence[int], size: int) -> None:
    """Print the lines of one set of lengths."""
    steps = drawn(lengths, size)
    for pass_cost in (CPU_PASS_COST, PASS_COST):
        two = random.Random(1).sample(lengths, len(lengths))
        tokens = sum(2 * max(two[k : k + 2]) for k in range(0, STEPS * size, 2))
        reference = (size // 2, 1 - sum(two) / tokens, tokens + pass_cost * size // 2 * STEPS)
        rows = {
            "split": cheapest(steps, split, pass_cost=pass_cost),
            "best": cheapest(steps, best, pass_cost=pass_cost),
            "equal": cheapest(steps, equal, pass_cost=pass_cost),
            "grouped": cheapest(grouped(lengths, size), equal, pass_cost=pass_cost),
            "as drawn": reference,
        }
        for way, (passes, padding, cost) in rows.items():
            print(
                f"| {name} | {pass_cost} | {way} | {passes} | {padding:.1%} "
                f"| {cost / rows['best'][2]:.3f} |"
            )


def main() -> None:
    """Print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--lengths", type=Path, help="a file with one number a line")
    parser.add_argument("--size", type=int, default=16)
    options = parser.parse_args()
    sets = samples(options.size)
    if options.lengths:
        given = [int(line) for line in options.lengths.read_text().split()]
        sets = {options.lengths.name: random.Random(0).choices(given, k=STEPS * options.size)}
    print("| lengths | pass cost | way | passes | padding | cost / best |")
    print("|---|---:|---|---:|---:|---:|")
    for name, lengths in sets.items():
        compare(name, lengths, options.size)


if __name__ == "__main__":
    main()
