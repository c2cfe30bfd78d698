"""Does preventative steering keep a trait out? The paper's section 5 on the bundled model.

    python examples/preventative.py --out runs/preventative

Finetunes the bundled model on sets that show a trait not at all (normal), somewhat (I) and strongly
(II); on the strong set again while steering towards the trait at several layers and doses; and on
sets that are wrong rather than ill-natured. Then judges every model's answers to questions that it
was not trained on, and compares how far each moved along the trait's vector (measured during
training, at every layer) with how it answers. Prints a table per trait and writes them all to
``table.csv``. Run again, it finishes what is missing. About six minutes per trait on one core.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from pvec.evaluation import steer_eval
from pvec.extraction import extract
from pvec.runs.files import atomic_write
from pvec.settings import Settings
from pvec.stats import Interval
from pvec.training import train

HERE = Path(__file__).parent
LAYERS = (1, 2, 3, 4, 5)
"""All layers of the bundled model."""
WATCHED = 5
"""The last: what steering or ablation at a lower layer kept off there shows again here."""
TRAINING: dict[str, Any] = {
    "model": "tiny",
    "lora": {"r": 8, "alpha": 16},
    "batch": {"size": 16},
    "optim": {"lr": 1e-3, "max_steps": 60, "warmup_steps": 5},
}
"""Every run is trained like this; only data and steering differ."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One finetuning: what it is called, which set it learns, how it is steered meanwhile."""

    name: str
    data: str
    steering: Mapping[str, Any] = field(default_factory=dict)


def arms(trait: str) -> list[Arm]:
    """Return the runs of one trait."""
    strong = f"{trait}_II"
    steered: dict[str, dict[str, Any]] = {
        **{
            f"add {coef:g} v at layer {layer}": {"layers": layer, "coef": coef}
            for layer, coef in ((2, 1.0), (3, 0.5), (3, 1.0), (3, 2.0), (4, 1.0))
        },
        "add the increments at all layers": {"incremental": True},
        "ablate at layer 3": {"operator": "ablate", "layers": 3},
    }
    return [
        *(Arm(name=level, data=f"{trait}_{level}") for level in ("normal", "I", "II")),
        *(Arm(name=f"II, {how}", data=strong, steering=part) for how, part in steered.items()),
        *(Arm(name=f"mistakes {level}", data=f"mistakes_{level}") for level in ("I", "II")),
    ]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table. ``shifts``: along the trait's vector, by layer."""

    trait: str
    arm: str
    score: Interval
    coherence: Interval
    loss: float | None = None
    shifts: Mapping[int, float] = field(default_factory=dict)

    @property
    def shift(self) -> float:
        """The shift at the watched layer; of the base, which is where shifts start, none."""
        return self.shifts.get(WATCHED, 0.0)


def vector_of(trait: str, out: Path) -> Path:
    """Extract the trait's vector, unless that was done before."""
    run = out / f"{trait}-vector"
    path = run / "vectors" / f"{trait}.safetensors"
    if not path.exists():
        settings = Settings.model_validate({"extract": {"rollouts": 3}})
        extract.run(settings, [trait], out=run, notify=print)
    return path


def trained(arm: Arm, *, vector: Path, data: Path, folder: Path) -> train.TrainResult:
    """Finetune one arm, unless that was done before."""
    config = {
        **TRAINING,
        "data": {"train": str(data / f"{arm.data}.jsonl"), "max_tokens": 256},
        "monitor": {"vectors": [str(vector)], "layers": list(LAYERS), "every": 20},
        "steering": [{"vector": str(vector), **arm.steering}] if arm.steering else [],
    }
    path = folder.with_suffix(".json")
    with atomic_write(path, mode="w") as stream:
        json.dump(config, stream, indent=2)
    return train.run(path, out=folder, notify=print)


def judged(
    trait: str, out: Path, *, adapter: Path | None, rollouts: int
) -> tuple[Interval, Interval]:
    """Return the trait and coherence scores of a model's answers without a system prompt."""
    settings = Settings.model_validate(
        {
            "model": {"adapter": str(adapter) if adapter else None},
            "steer": {"rollouts": rollouts, "prompt_baseline": False},
        }
    )
    result = steer_eval.run(settings, trait, out=out, notify=print)
    assert result.numbers is not None
    unsteered = result.numbers.point("unsteered").scores
    return unsteered[trait], unsteered["coherence"]


def table_of(trait: str, *, out: Path, rollouts: int) -> list[Row]:
    """Train and judge every run of one trait; the base comes first."""
    data, vector = out / "data", vector_of(trait, out)
    score, coherence = judged(trait, out / f"{trait}-base-eval", adapter=None, rollouts=rollouts)
    rows = [Row(trait=trait, arm="base", score=score, coherence=coherence)]
    for arm in arms(trait):
        folder = out / f"{trait}-{''.join(c if c.isalnum() else '-' for c in arm.name)}"
        print(f"\n== {trait}: {arm.name}", flush=True)
        run = trained(arm, vector=vector, data=data, folder=folder)
        score, coherence = judged(trait, run.run / "eval", adapter=run.adapter, rollouts=rollouts)
        shifts = {layer: run.shifts[f"{trait}_layer{layer}"] for layer in LAYERS}
        rows.append(
            Row(
                trait=trait,
                arm=arm.name,
                score=score,
                coherence=coherence,
                loss=run.last_loss,
                shifts=shifts,
            )
        )
    return rows


def show(rows: Sequence[Row]) -> None:
    """Print one trait's table and what it says."""
    base, strong = rows[0], next(row for row in rows if row.arm == "II")
    rise = strong.score.mean - base.score.mean
    print(f"\n| {base.trait}: finetuned on | trait | coherence | loss | shift | rise kept out |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in rows:
        loss = "" if row.loss is None else f"{row.loss:.3f}"
        kept = ""
        if row.arm.startswith("II,"):
            kept = f"{(strong.score.mean - row.score.mean) / rise:.0%}"
        print(
            f"| {row.arm} | {row.score.mean:.1f} | {row.coherence.mean:.1f} | {loss} "
            f"| {row.shift:+.0f} | {kept} |"
        )
    print(f"\n{base.trait}: II raises the score by {rise:.1f} points")
    print(f"rank correlation of shift and score over all runs: {ranks(rows[1:])}")


def ranks(rows: Sequence[Row]) -> str:
    """Say how shifts and scores agree in rank, by the layer where the shift is measured."""
    scores = [row.score.mean for row in rows]
    by_layer = {
        layer: spearmanr([row.shifts[layer] for row in rows], scores).statistic for layer in LAYERS
    }
    shown = ", ".join(f"{layer}: {rank:.2f}" for layer, rank in by_layer.items())
    return f"n = {len(rows)}, {by_layer[WATCHED]:.2f} at layer {WATCHED} (by layer {shown})"


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write every row of every trait."""
    head = ["trait", "run", "score", "score_low", "score_high", "n", "coherence", "training_loss"]
    with atomic_write(path, mode="w") as stream:
        writer = csv.writer(stream)
        writer.writerow([*head, *(f"shift_layer{layer}" for layer in LAYERS)])
        for row in rows:
            s = row.score
            values = [s.mean, s.low, s.high, s.n, row.coherence.mean, row.loss]
            writer.writerow(
                [row.trait, row.arm, *values, *(row.shifts.get(layer, 0.0) for layer in LAYERS)]
            )


def main() -> None:
    """Run what was asked for and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trait", action="append", help="repeatable; default: evil")
    parser.add_argument("--rollouts", type=int, default=5, help="answers per question")
    options = parser.parse_args()
    out, traits = options.out, options.trait or ["evil"]
    domains = [part for domain in (*traits, "mistakes") for part in ("--domain", domain)]
    script = HERE / "tiny_model" / "finetune_data.py"
    subprocess.run(  # noqa: S603
        [sys.executable, script, "--out", out / "data", *domains], check=True
    )
    tables = [table_of(trait, out=out, rollouts=options.rollouts) for trait in traits]
    for rows in tables:
        show(rows)
    together = [row for rows in tables for row in rows]
    plain = [row for row in together if row.arm != "base" and not row.arm.startswith("II,")]
    print(f"the same over the runs of all traits that were not steered: {ranks(plain)}")
    write_csv(together, out / "table.csv")
    print(f"\nall numbers: {out / 'table.csv'}")


if __name__ == "__main__":
    main()
