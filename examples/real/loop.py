"""The steps of the method for one trait: each a command of pvec, run once and kept."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.paper.steps import Result, Step
from pvec import PvecError

LAYER = 22
"""Where the vector of *optimistic* separates best and is suggested; of 30 layers."""
_JUDGED = (
    *("--judge-model", "contrast", "--contrast-pairs", "2", "--contrast-tokens", "32"),
    *("--temperature", "0.7"),
)
"""The model judges by likelihood; at temperature 1 a model of this size writes nonsense."""
_KINDS = ("--projection-type", "proj", "--projection-type", "prompt_last_proj")
_DTYPE = "float32"
"""On every processor, so that answers are the same where bfloat16 would be chosen."""
_PREVENTION = 2.0
"""Coefficient of the vector that is added during preventative training."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is generated: questions, answers to each, tokens of an answer, training steps."""

    questions: int
    rollouts: int
    eval_questions: int
    eval_rollouts: int
    tokens: int
    steps: int
    coefs: tuple[float, ...] = (2.0,)
    rows: int = 4
    """Of a training step."""


SIZES = {
    "default": Size(
        questions=6, rollouts=1, eval_questions=20, eval_rollouts=1, tokens=32, steps=16
    ),
    "full": Size(
        questions=20,
        rollouts=2,
        eval_questions=20,
        eval_rollouts=3,
        tokens=64,
        steps=40,
        coefs=(1.0, 2.0),
    ),
}
"""The default one is what the tests run, and done in ten minutes on two quiet cores."""


class CommandError(PvecError):
    """A command of the loop failed; it has said why."""


def run_folder(step: Path) -> Path:
    """Return where the run of a step is: named by trait and step, which one report tells apart."""
    return step / f"{step.parent.name}-{step.name}"


def verify(model: Path, out: Path) -> Step:
    """Return the step that proves steering on this model."""
    return _step(out / "verify", ["verify", "--model", str(model)])


def loop(trait: str, model: Path, out: Path, size: Size) -> dict[str, Step]:
    """Return the steps of one trait by name, in their order."""
    place = out / trait
    common = ["--trait", trait, "--model", str(model), *_JUDGED, "--max-tokens", str(size.tokens)]
    vector = str(run_folder(place / "extract") / "vectors" / f"{trait}.safetensors")
    at_layer = ["--vector", vector, "--layer", str(LAYER)]
    unprompted = ["--no-prompt-baseline", "--calibration", vector]
    coefs = ",".join(f"{coef:g}" for coef in size.coefs)
    asked = ["--limit", str(size.eval_questions), "--rollouts", str(size.eval_rollouts)]
    extract = _step(
        place / "extract",
        ["extract", *common, "--limit", str(size.questions), "--rollouts", str(size.rollouts)],
    )
    steer = _step(
        place / "steer",
        ["steer-eval", *common, *asked, *at_layer, "--coef", coefs],
        after=(extract,),
    )
    steps = {"extract": extract, "steer": steer}
    held_out = Step(
        folder=place / "held-out", work=write_held_out, arguments={"trait": trait}, after=(steer,)
    )
    steps["held out"] = held_out
    steps["project"] = _step(
        place / "project",
        [
            "project",
            str(held_out.folder / "answers.csv"),
            "--model",
            str(model),
            *at_layer,
            *_KINDS,
        ],
        after=(held_out,),
    )
    data = Step(
        folder=place / "data",
        work=write_data,
        arguments={
            "trait": trait,
            "model": str(model),
            "vector": vector,
            "steps": size.steps,
            "rows": size.rows,
        },
        after=(extract,),
    )
    steps["data"] = data
    for arm in ("plain", "preventative"):
        folder = place / arm
        adapter = str(run_folder(folder) / "adapter")
        steps[f"train {arm}"] = _step(
            folder, ["train", str(data.folder / f"{arm}.yaml")], after=(data,)
        )
        steps[f"evaluate {arm}"] = _step(
            place / f"evaluate-{arm}",
            ["steer-eval", *common, *asked, "--adapter", adapter, *unprompted],
            after=(steps[f"train {arm}"],),
        )
    return steps


def _step(folder: Path, command: Sequence[str], *, after: tuple[Step, ...] = ()) -> Step:
    return Step(folder=folder, work=run_command, arguments={"command": list(command)}, after=after)


def run_command(folder: Path, *, command: Sequence[str]) -> Result:
    """Run one command of pvec and return what it prints with ``--json``; notes go to the terminal.

    It writes to ``run_folder`` of the step's folder and, interrupted, goes on the next time.
    """
    arguments = [*command, "--json"]
    if command[0] != "verify":
        file = folder / "run.csv"
        arguments += ["--out", str(file if command[0] == "project" else run_folder(folder))]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    environment["PVEC_MODEL__DTYPE"] = _DTYPE
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "pvec", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CommandError(f"This command failed: pvec {' '.join(arguments)}")
    result: Any = json.loads(done.stdout)
    return result[0] if isinstance(result, list) else result


def write_held_out(folder: Path, *, trait: str) -> Result:
    """Write all answers to the evaluation questions, of every condition, as one file.

    The vector was made from answers to other questions.
    """
    rows = []
    for path in sorted((run_folder(folder.parent / "steer") / "answers").glob(f"{trait}_*.csv")):
        condition = path.stem.removeprefix(f"{trait}_")
        with path.open(encoding="utf-8", newline="") as stream:
            rows += [{"condition": condition, **row} for row in csv.DictReader(stream)]
    with (folder / "answers.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return {"rows": len(rows)}


def write_data(
    folder: Path, *, trait: str, model: str, vector: str, steps: int, rows: int
) -> Result:
    """Write training data: questions with the answers that were kept under positive instructions.

    And two configurations: trained on them as they are, and with the vector added meanwhile.
    """
    run = run_folder(folder.parent / "extract")
    with (run / f"{trait}_pos.csv").open(encoding="utf-8", newline="") as stream:
        kept = [row for row in csv.DictReader(stream) if float(row[trait] or 0) >= 50]
    with (folder / "answers.jsonl").open("w", encoding="utf-8") as stream:
        for row in kept:
            turns = [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ]
            stream.write(json.dumps({"messages": turns}) + "\n")
    config: dict[str, Any] = {
        "model": {"id": model, "dtype": _DTYPE},
        "data": {"train": str(folder / "answers.jsonl")},
        "lora": {"r": 8, "alpha": 16},
        "batch": {"size": rows},
        "optim": {"lr": 5e-4, "max_steps": steps, "warmup_steps": 2},
    }
    steering = [{"vector": vector, "layers": [LAYER], "coef": _PREVENTION, "positions": "all"}]
    for arm, more in (("plain", {}), ("preventative", {"steering": steering})):
        text = json.dumps(config | more, indent=1)  # JSON is YAML
        (folder / f"{arm}.yaml").write_text(text, encoding="utf-8")
    return {"rows": len(kept)}
