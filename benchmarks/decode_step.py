"""What a decode step spends its time on: products of matrices, and everything else.

    python benchmarks/decode_step.py --model FOLDER [--rows 24 64 256] [--greedy]

One thread, CPU time (user and system). Rows have different prompts of 33 to 64 tokens and are
sampled at temperature 1. The step is timed without a profiler, as is sampling in it; torch's
profiler then says what share of the forward pass each kind of operation has. ``rest`` is what no
operation accounts for: Python, what calls cost, and the rows' own lists.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from common import parser_of, timed

from pvec.backends.hf.backend import HFBackend
from pvec.backends.hf.batch_check import check_batching
from pvec.backends.hf.generation import DecodeBatch
from pvec.backends.hf.rows import admit_all
from pvec.backends.hf.sampling import sample_tokens
from pvec.models.files import ModelSpec
from pvec.types import Request, Sampling

KINDS = {
    "products": ("mm", "addmm", "bmm", "linear", "matmul"),
    "attention": ("_scaled_dot_product", "scaled_dot_product"),
    "copies": ("copy_", "cat", "index", "clone", "gather", "contiguous", "to", "_to_copy"),
}
"""Beginnings of the names of operations; the others are norms, rotary embeddings, activations."""


def batch_of(backend: Any, rows: int, *, greedy: bool) -> Any:
    """Return a decode batch that has run a few steps."""
    requests = [
        Request(
            id=str(row),
            prompt_ids=tuple(
                100 + (7919 * (row + 1) * (i + 1)) % 9000 for i in range(33 + row % 32)
            ),
            sampling=Sampling(temperature=0 if greedy else 1, max_tokens=200, seed=row),
        )
        for row in range(rows)
    ]
    model = replace(check_batching(backend._causal), stop_ids=frozenset())  # no row ends
    batch = DecodeBatch(model)
    batch.extend(admit_all(requests, model))
    for _ in range(3):
        batch.step()
    return batch


def seconds(run: Callable[[], object], times: int) -> float:
    """Return the median CPU time of ``run``."""
    return statistics.median(timed(run)[0] for _ in range(times))


def by_kind(run: Callable[[], object], times: int) -> dict[str, float]:
    """Return the shares of the kinds of operations in the time of ``run``."""
    whole = "one step"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(times):
            with torch.profiler.record_function(whole):
                run()
    events = profile.key_averages()
    (total,) = (event.cpu_time_total for event in events if event.key == whole)
    shares = dict.fromkeys((*KINDS, "other operations"), 0.0)
    for event in events:
        name = event.key.removeprefix("aten::")
        kind = next((k for k, names in KINDS.items() if name.startswith(names)), "other operations")
        if event.key != whole:
            shares[kind] += event.self_cpu_time_total / total
    return shares


def line(backend: Any, rows: int, args: argparse.Namespace) -> str:
    """Measure at one number of rows and return a line of the table."""
    # ruff: noqa: SLF001 - the parts of a step
    batch = batch_of(backend, rows, greedy=args.greedy)
    samplings = [row.request.sampling for row in batch.rows]
    with torch.inference_mode():
        total = seconds(batch.step, args.steps)
        logits = batch._logits.clone()
        sampling = seconds(lambda: sample_tokens(logits, samplings, [3] * rows), args.steps)
        forward = seconds(batch._run_newest, args.steps)
        kinds = {kind: s * forward for kind, s in by_kind(batch._run_newest, args.steps).items()}
    parts = [*kinds.values(), sampling, total - sampling - sum(kinds.values())]
    shares = " | ".join(f"{part / total:.1%}" for part in parts)
    return f"| {rows} | {1000 * total:.0f} | {shares} |"


def main() -> None:
    """Print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", required=True, help="folder of a chat model")
    parser.add_argument("--rows", type=int, nargs="+", default=[24, 64, 256])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--greedy", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    backend = HFBackend(ModelSpec(model=args.model, dtype="float32"))
    torch.set_num_threads(1)
    heads = " | ".join((*KINDS, "other operations", "sampling", "rest"))
    print(f"| rows | ms a step | {heads} |\n|---:|---:|{'---:|' * (len(KINDS) + 3)}")
    for rows in args.rows:
        print(line(backend, rows, args), flush=True)


if __name__ == "__main__":
    main()
