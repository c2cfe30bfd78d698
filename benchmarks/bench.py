"""The small benchmarks in one go: today's ratios beside the stored ones.

    python benchmarks/bench.py [--save] [--model FOLDER --repeng PYTHON --steering-vectors PYTHON]

Every line is how many times less CPU time pvec takes than the usual way, on one thread, in the same
run; see the scripts for what they compare. Machines are noisy, so nothing fails: what fell by more
than a fifth against ``benchmarks/ratios.json`` is marked. ``--save`` writes today's ratios there.
With ``--model`` a chat model is also run beside the steering libraries given (``peers.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from common import ONE_THREAD, parser_of

HERE = Path(__file__).parent
STORED = HERE / "ratios.json"
FELL = 0.8
"""Below this share of the stored ratio a line is marked."""

Script = tuple[str, Sequence[str], str]
"""A script, its arguments, and a pattern whose first group is the ratio in its output."""

SCRIPTS: dict[str, Script] = {
    "capture / one row at a time": (
        "capture.py",
        ("--size", "bundled", "--prompts", "2", "--threads", "1", "--clock", "cpu"),
        r"^\| bundled \|(?:[^|]*\|){3} ([\d.]+) \|",
    ),
    "project / one row at a time": (
        "project.py",
        ("--size", "bundled", "--rows", "120", "--clock", "cpu"),
        r"^\| bundled \|(?:[^|]*\|){3} ([\d.]+) \|",
    ),
    "sweep / model.generate with hooks": (
        "steering.py",
        ("--every", "18", "--rollouts", "2", "--threads", "1", "--clock", "cpu"),
        r"ratio: ([\d.]+) x in time",
    ),
    "training step / TRL's": ("training.py", ("--steps", "6"), r"^pvec.*? ([\d.]+) \["),
}


def peers(args: argparse.Namespace) -> Iterator[tuple[str, Script]]:
    """Yield the comparisons with the steering libraries that are given."""
    if args.model is None:
        return
    sizes = ("--model", args.model, "--answers", "24", "--tokens", "12", "--pairs", "6")
    given = ["--batches", "24", "--rounds", "1"]
    ways = {"hook": True, "repeng": args.repeng, "steering-vectors": args.steering_vectors}
    for name, python in ways.items():
        if python:
            option = [] if name == "hook" else [f"--{name}", python]
            pattern = rf"^\| {name} \|(?:[^|]*\|){{4}} ([\d.]+) \|"
            yield f"steered answers / {name}", ("peers.py", (*sizes, *given, *option), pattern)


def ratio(script: Script) -> float | str:
    """Run a script; return the ratio in its output, or the last line of what went wrong."""
    file, arguments, pattern = script
    done = subprocess.run(  # noqa: S603
        [sys.executable, str(HERE / file), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | ONE_THREAD,
    )
    found = re.search(pattern, done.stdout, re.MULTILINE)
    if done.returncode == 0 and found:
        return float(found[1])
    return (done.stderr.strip() or "no ratio in the output").splitlines()[-1][:80]


def line(name: str, now: float | str, before: float | None) -> str:
    """Return a row of the table."""
    shown = "–" if before is None else f"{before:.2f}"
    if isinstance(now, str):
        return f"| {name} | – | {shown} | failed: {now} |"
    if before is None:
        return f"| {name} | {now:.2f} | {shown} | new |"
    mark = " FELL by more than a fifth" if now < FELL * before else ""
    return f"| {name} | {now:.2f} | {shown} | {now / before - 1:+.0%}{mark} |"


def main() -> None:
    """Print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--save", action="store_true", help="store today's ratios")
    parser.add_argument("--model", help="folder of a chat model, for the libraries")
    parser.add_argument("--repeng", help="Python of an environment with repeng")
    parser.add_argument("--steering-vectors", help="Python of an environment with steering-vectors")
    args = parser.parse_args()
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    started, now = time.monotonic(), {}
    print("| CPU time: pvec / … | now | stored | change |\n|---|---:|---:|---|")
    for name, script in (*SCRIPTS.items(), *peers(args)):
        now[name] = ratio(script)
        print(line(name, now[name], stored.get(name)), flush=True)
    print(f"\n{time.monotonic() - started:.0f} s")
    if args.save:
        measured = {name: value for name, value in now.items() if isinstance(value, float)}
        STORED.write_text(json.dumps(stored | measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
