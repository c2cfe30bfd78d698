"""How far a value travels through the code: files and holders between the command line and its use.

Runs four small commands on the bundled model under a profiler and counts, for each journey, the
source files whose functions ran, the files in which the value was held by a local variable or an
attribute of one, and the types that held it. Fewer is easier to follow. Works on any checkout:

    PYTHONPATH=src python benchmarks/journeys.py
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

COEF = 0.8125
"""A number that nothing else in the run is equal to, exact in binary."""
WORD = "quokkaberry"
"""A word that no other text of the run holds."""


class Journey:
    """Counts where a value was seen. ``holds`` tells whether a plain value is the one followed."""

    def __init__(self, package: Path, holds: Callable[[Any], bool]) -> None:
        self.package = str(package)
        self.holds = holds
        self.executed: set[str] = set()
        self.files: set[str] = set()
        self.forms: set[str] = set()
        self._seen: dict[int, bool] = {}

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """Look at a function of the package as it returns."""
        path = frame.f_code.co_filename
        if event != "return" or not path.startswith(self.package):
            return
        if frame.f_code.co_name != "<module>":
            self.executed.add(path)
        for value in list(frame.f_locals.values()):
            for form in self._forms(value):
                self.files.add(path)
                self.forms.add(form)

    def _forms(self, value: Any, depth: int = 0) -> Iterator[str]:
        """Yield the names of the types that hold the value, from the outside in."""
        if isinstance(value, int | float | str | bytes):
            if self.holds(value):
                yield type(value).__name__
        elif depth < 3:
            for inside in _parts(value):
                for form in self._forms(inside, depth + 1):
                    yield form
                    yield type(value).__name__


def _parts(value: Any) -> list[Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    if isinstance(value, list | tuple):
        return list(value[:8])
    if isinstance(value, dict):
        return list(value.values())[:32]
    fields = getattr(type(value), "model_fields", None)
    return [getattr(value, name, None) for name in fields] if isinstance(fields, dict) else []


def run(arguments: list[str], holds: Callable[[Any], bool]) -> Journey:
    """Run one ``pvec`` command in this process and return what was counted."""
    import pvec
    from pvec.cli.app import main

    journey = Journey(Path(pvec.__file__).parent, holds)
    threading.setprofile(journey)
    sys.setprofile(journey)
    try:
        main(arguments)
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return journey


def report(name: str, journey: Journey) -> None:
    """Print one line."""
    print(
        f"{name}: {len(journey.executed)} files executed; "
        f"held in {len(journey.files)} files by {len(journey.forms)} types "
        f"({', '.join(sorted(journey.forms))})"
    )


def number(value: Any) -> bool:
    """Tell whether this is the coefficient."""
    return value == COEF if isinstance(value, float) else value == str(COEF)


def main() -> None:
    """Make the four journeys."""
    journey, out = sys.argv[1], Path(sys.argv[2])
    vector = str(out / "extract" / "vectors" / "evil.safetensors")
    few = ["--limit", "2", "--rollouts", "4"]
    if journey == "extract":
        arguments = ["extract", "--trait", "evil", "--rollouts", "1", "--out", str(out / "extract")]
        report("a trait name to its vector file", run(arguments, lambda value: value == "evil"))
    elif journey == "coef":
        steer = ["--vector", vector, "--layer", "3", "--coef", str(COEF), *few]
        arguments = ["steer-eval", "--trait", "evil", *steer, "--out", str(out / "sweep")]
        report("a coefficient to the hook", run(arguments, number))
    elif journey == "row":
        rows = out / "rows.jsonl"
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": WORD}]
        rows.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
        arguments = ["project", str(rows), "--vector", vector, "--layer", "3", "--overwrite"]
        report("a row of a file", run(arguments, lambda value: WORD in str(value)))
    else:
        data, config = out / "train.jsonl", out / "train.yaml"
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
        data.write_text((json.dumps({"messages": messages}) + "\n") * 8, encoding="utf-8")
        steering = [{"vector": vector, "layers": [3], "coef": COEF}]
        tree = {"data": {"train": str(data)}, "optim": {"max_steps": 2}, "steering": steering}
        config.write_text(json.dumps(tree), encoding="utf-8")
        arguments = ["train", str(config), "--out", str(out / "train")]
        report("a coefficient of a training", run(arguments, number))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        import subprocess

        with tempfile.TemporaryDirectory() as folder:
            for name in ("extract", "coef", "row", "train"):
                subprocess.run([sys.executable, __file__, name, folder], check=True)  # noqa: S603
    else:
        main()
