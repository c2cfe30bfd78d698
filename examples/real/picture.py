"""One picture of several traits: which conditions move the score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from examples.real.loop import LAYER
from examples.real.summary import Loop
from pvec.report.dots import bars
from pvec.report.figure import Figure


def scores(loops: Sequence[Loop], *, model: str) -> Figure:
    """Draw the trait score of each condition with its interval, a colour for each trait."""
    coefs = loops[0].coefs
    alone = f", coefficient {coefs[0]:g}" if len(coefs) == 1 else ""
    conditions = [condition.name.removesuffix(alone) for condition in loops[0].conditions]
    return bars(
        name="conditions",
        title=f"{model}, judged by itself",
        caption=f"Answers to the same questions in each condition, layer {LAYER}{alone}.",
        label="trait score",
        groups=conditions,
        series={loop.trait: [c.trait for c in loop.conditions] for loop in loops},
    )


def write(loops: Sequence[Loop], path: Path, *, model: str) -> None:
    """Write the picture as SVG."""
    path.write_text(scores(loops, model=model).svg(), encoding="utf-8")
