"""Does preventative steering keep a trait out? The paper's section 5 on the bundled model.

    python examples/preventative.py --out runs/preventative

Finetunes the bundled model on sets that show a trait not at all (normal), somewhat (I) and strongly
(II); on the strong set again while steering towards the trait in several ways; and on a set that is
wrong rather than ill-natured. Then judges every model's answers to questions it was not trained on,
and compares how far each moved along the trait's vector (measured during training) with how it
answers. Run again, it finishes what is missing. About half an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from pvec.io.files import atomic_write
from pvec.settings import Settings
from pvec.workflows import extract, steer_eval, train

HERE = Path(__file__).parent
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
    return [
        Arm(name="normal", data=f"{trait}_normal"),
        Arm(name="I", data=f"{trait}_I"),
        Arm(name="II", data=strong),
        Arm(name="II, add 0.5 v", data=strong, steering={"layers": 3, "coef": 0.5}),
        Arm(name="II, add 1 v", data=strong, steering={"layers": 3, "coef": 1.0}),
        Arm(name="II, add 2 v", data=strong, steering={"layers": 3, "coef": 2.0}),
        Arm(name="II, all layers", data=strong, steering={"incremental": True, "coef": 1.0}),
        Arm(name="II, ablate", data=strong, steering={"operator": "ablate", "layers": 3}),
        Arm(name="mistakes", data="mistakes_II"),
    ]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table."""

    arm: str
    trait: float
    coherence: float
    loss: float | None
    shift: float


def vector_of(trait: str, out: Path) -> Path:
    """Extract the trait's vector, unless that was done before."""
    run = out / f"extract-{trait}"
    (result,) = extract.run(Settings(extract={"rollouts": 3}), [trait], out=run, say=print)
    assert result.vector is not None
    return result.vector.path


def trained(arm: Arm, *, trait: str, vector: Path, data: Path, out: Path) -> train.TrainResult:
    """Finetune one arm."""
    config = {
        **TRAINING,
        "data": {"train": str(data / f"{arm.data}.jsonl"), "max_tokens": 256},
        "monitor": {"vectors": [str(vector)], "every": 20},
        "steering": [{"vector": str(vector), **arm.steering}] if arm.steering else [],
    }
    folder = out / f"{trait}-{''.join(c if c.isalnum() else '-' for c in arm.name)}"
    path = folder.with_suffix(".json")
    with atomic_write(path, mode="w") as stream:
        json.dump(config, stream, indent=2)
    return train.run(path, out=folder, say=print)


def scores(trait: str, out: Path, *, adapter: Path | None, rollouts: int) -> tuple[float, float]:
    """Return the mean trait and coherence scores of a model's answers without a system prompt."""
    settings = Settings(
        model={"adapter": str(adapter) if adapter else None},
        steer={"rollouts": rollouts, "prompt_baseline": False},
    )
    result = steer_eval.run(settings, trait, out=out, say=print)
    assert result.numbers is not None
    unsteered = result.numbers.point("unsteered").scores
    return unsteered[trait].mean, unsteered["coherence"].mean


def main() -> None:
    """Run what was asked for and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trait", default="evil")
    parser.add_argument("--rollouts", type=int, default=5)
    options = parser.parse_args()
    out, trait = options.out, options.trait
    data = out / "data"
    script = HERE / "tiny_model" / "finetune_data.py"
    subprocess.run(  # noqa: S603
        [sys.executable, script, "--out", data, "--domain", trait, "--domain", "mistakes"],
        check=True,
    )
    vector = vector_of(trait, out)
    base = scores(trait, out / f"{trait}-base-eval", adapter=None, rollouts=options.rollouts)
    rows = [Row(arm="base", trait=base[0], coherence=base[1], loss=None, shift=0.0)]
    for arm in arms(trait):
        result = trained(arm, trait=trait, vector=vector, data=data, out=out)
        found = scores(
            trait, result.run / "eval", adapter=result.adapter, rollouts=options.rollouts
        )
        rows.append(
            Row(
                arm=arm.name,
                trait=found[0],
                coherence=found[1],
                loss=result.last_loss,
                shift=result.shifts[trait],
            )
        )
    show(rows)


def show(rows: list[Row]) -> None:
    """Print the table and what it says."""
    by_name = {row.arm: row for row in rows}
    base, strong = by_name["base"], by_name["II"]
    rise = strong.trait - base.trait
    print("| run | trait | coherence | training loss | shift | of the rise prevented |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in rows:
        prevented = ""
        if row.arm.startswith("II,"):
            prevented = f"{(strong.trait - row.trait) / rise:.0%}"
        loss = "" if row.loss is None else f"{row.loss:.3f}"
        print(
            f"| {row.arm} | {row.trait:.1f} | {row.coherence:.1f} | {loss} | {row.shift:+.1f} "
            f"| {prevented} |"
        )
    rank = spearmanr([row.shift for row in rows], [row.trait for row in rows]).statistic
    print(
        f"rise from base to II: {rise:.1f}; rank correlation of shift and trait over "
        f"{len(rows)} models: {rank:.2f}"
    )


if __name__ == "__main__":
    main()
