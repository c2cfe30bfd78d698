"""Replay the paper's findings on the bundled model and write one report.

    python -m examples.paper

Answers, scores, finetunings and numbers are kept in the folder; the same command goes on where it
was and repeats nothing. ``--full`` takes more seeds, questions and facts; ``--size ci`` is a quick
look with one seed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from examples.paper.numbers import format_interval
from examples.paper.plan import seeds
from examples.paper.sizes import SIZES
from examples.paper.steps import Step, run_steps
from pvec import PvecError


def main() -> int:
    """Do what is missing, write the report, and say what was found."""
    options = _options()
    size = SIZES["full" if options.full else options.size]
    if options.seeds:
        size = replace(size, seeds=tuple(range(options.seeds)))
    out = options.out / size.name
    plans = seeds(size, out)
    steps: list[Step] = [step for plan in plans for step in plan.steps.values()]
    started = time.monotonic()
    try:
        done = run_steps(steps, jobs=options.jobs, notify=lambda text: print(text, flush=True))
    except PvecError as error:
        print(f"{error}", file=sys.stderr)
        return 2
    from examples.paper import report

    path, told = report.write([plan.results() for plan in plans], size, out)
    for one in told:
        print(f"\n{one.number}. {one.title}: {one.outcome}\n   {one.here}")
        for check in one.checks:
            found = format_interval(check.interval, digits=2)
            print(f"   {check.outcome:11}  {check.what}: {found} (expected {check.expected})")
    minutes = (time.monotonic() - started) / 60
    print(f"\n{done} steps done, {len(steps) - done} were there, {minutes:.1f} minutes\n{path}")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/paper"))
    parser.add_argument("--size", choices=tuple(SIZES), default="default")
    parser.add_argument("--full", action="store_true", help="the same as --size full")
    parser.add_argument("--seeds", type=int, help="another number of seeds than the size's")
    parser.add_argument(
        "--jobs", type=int, default=_cores(), help="processes (default: %(default)s)"
    )
    return parser.parse_args()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
