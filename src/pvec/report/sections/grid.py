"""A grid of runs: models by traits as one table and picture, then what was steered and shifted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby

from pvec.evaluation.summary import COHERENCE, SweepSummary
from pvec.report.axes import SCORE_AXIS, XAxis
from pvec.report.dots import bars
from pvec.report.figure import Cell, Difference, Figure, Table
from pvec.report.figures import Line, Panel, line_chart
from pvec.report.grids import Grid, heat_map
from pvec.report.page import Chapter, Section
from pvec.report.sections.common import listed
from pvec.report.sections.grid_numbers import (
    Cosines,
    GridNumbers,
    GridRuns,
    ShiftCell,
    TraitInModel,
)
from pvec.report.sections.sweep_lines import control_line, sweep_line
from pvec.runs.grid import GridCell
from pvec.runs.names import model_label
from pvec.stats import Interval

_BARS = 12
"""Up to so many models and traits are drawn as bars; the heat maps have them all."""

_MULTIPLES = 30
"""Up to so many curves are drawn beside each other; the table has them all."""

_APART = (
    "Models that were trained apart share no basis, so the cosine of their vectors is expected to "
    "be near 0 whatever they mean; it compares finetunes of one base."
)


def build(runs: GridRuns, numbers: GridNumbers) -> Chapter:
    """Return the sections of a grid: its vectors, its sweeps, its shifts, and every cell."""
    name = runs.grid.path.resolve().name
    found = [_vectors(numbers, name)]
    if numbers.steering:
        found.append(_steering(numbers, runs.sweeps, name))
    if numbers.shifts:
        found.append(_shifts(numbers, name))
    return Chapter(summary=found[0].summary, sections=(*found, _cells(numbers.cells, name)))


def _vectors(numbers: GridNumbers, name: str) -> Section:
    models = list(dict.fromkeys(item.model for item in numbers.traits))
    traits = list(dict.fromkeys(item.trait for item in numbers.traits))
    done = sum(cell.state == "done" for cell in numbers.cells)
    notes = [] if done == len(numbers.cells) else [_unfinished(numbers.cells)]
    if numbers.model_cosines:
        notes.append(_APART)
    return Section(
        id="grid",
        title=f"Grid {name}",
        summary=(
            f"{listed(traits)} in {listed(models)}: {done} of {len(numbers.cells)} runs are done."
            f"{_alike(numbers.traits)}"
        ),
        notes=tuple(notes),
        figures=tuple(_vector_figures(numbers, models, traits)),
        tables=(("Every model and trait", _trait_table(numbers.traits)),),
        source=f"grid {name}",
    )


def _alike(traits: Sequence[TraitInModel]) -> str:
    """Say in a sentence where the suggested layers lie and how alike the vectors of seeds are."""
    depths = [round(100 * item.depth) for item in traits if item.depth is not None]
    cosines = [item.seed_cosine.mean for item in traits if item.seed_cosine is not None]
    ends = " to ".join(map(str, sorted({min(depths), max(depths)}))) if depths else ""
    text = f" Suggested layers lie at {ends} % of depth" if depths else ""
    if cosines:
        text += f"; the cosine between the vectors of two seeds is {min(cosines):.3f} or more"
    return text and f"{text}."


def _unfinished(cells: Sequence[GridCell]) -> str:
    failed = sum(cell.state == "failed" for cell in cells)
    pending = sum(cell.state == "pending" for cell in cells)
    return (
        f"{failed} runs failed and {pending} are not finished; they are in no number here. The "
        f"same command goes on with them."
    )


def _trait_table(traits: Sequence[TraitInModel]) -> Table:
    columns = (
        "model", "trait", "positive (95 %)", "negative (95 %)", "unsteered (95 %)", "answers",
        "layer", "% of depth", "cosine of seeds (range)", "seeds", "split-half cosine",
    )  # fmt: skip
    rows = tuple(
        (
            item.model,
            item.trait,
            item.positive,
            item.negative,
            item.unsteered,
            item.positive.n if item.positive else None,
            item.layer,
            None if item.depth is None else round(100 * item.depth),
            item.seed_cosine,
            len(item.seeds),
            _split_half(item),
        )
        for item in traits
    )
    return Table(columns=columns, rows=rows)


def _split_half(item: TraitInModel) -> float | None:
    """Return the mean over seeds."""
    known = [seed.split_half.mean for seed in item.seeds if seed.split_half is not None]
    return sum(known) / len(known) if known else None


def _vector_figures(
    numbers: GridNumbers, models: Sequence[str], traits: Sequence[str]
) -> Iterator[Figure]:
    if any(item.positive is not None for item in numbers.traits):
        if len(numbers.traits) <= _BARS:
            yield _score_bars(numbers.traits)
        else:
            yield _map(
                numbers.traits, models, traits,
                {i: item.positive.mean for i, item in enumerate(numbers.traits) if item.positive},
                name="grid_scores", title="Trait score under positive instructions",
                caption="Mean over all seeds.", label="trait score",
            )  # fmt: skip
    depths = {i: 100 * t.depth for i, t in enumerate(numbers.traits) if t.depth is not None}
    if depths:
        yield _map(
            numbers.traits, models, traits, depths,
            name="grid_depth", title="Suggested layer as a share of depth",
            caption="The lower median over seeds, in per cent of all layers.", label="% of depth",
        )  # fmt: skip
    cosines = {i: t.seed_cosine.mean for i, t in enumerate(numbers.traits) if t.seed_cosine}
    if cosines:
        yield heat_map(
            Grid(
                columns=("trait", traits),
                rows=("model", models),
                values=_values(numbers.traits, models, traits, cosines),
                value_label="cosine of seeds",
                limits=(0.0, 1.0),
                scale="quality",
                digits=2,
                first_row="top",
            ),
            name="grid_seeds",
            title="Stability: cosine between seeds",
            caption="Mean over pairs of seeds, at the suggested layer (the lower median).",
        )
    for what, found in (("traits", numbers.trait_cosines), ("models", numbers.model_cosines)):
        for cosines_of in found:
            yield _cosine_map(cosines_of, what)


def _score_bars(traits: Sequence[TraitInModel]) -> Figure:
    series: dict[str, list[Interval | None]] = {
        "positive": [item.positive for item in traits],
        "negative": [item.negative for item in traits],
        "unsteered": [item.unsteered for item in traits],
    }
    return bars(
        name="grid_scores",
        title="Trait score of every model and trait",
        caption="Under positive and negative instructions and, where the grid was evaluated, "
        "without any; all seeds together.",
        label="trait score",
        groups=[f"{item.trait}, {item.model}" for item in traits],
        series={name: values for name, values in series.items() if any(values)},
    )


def _map(
    items: Sequence[TraitInModel], models: Sequence[str], traits: Sequence[str],
    values: dict[int, float], *, name: str, title: str, caption: str, label: str,
) -> Figure:  # fmt: skip
    return heat_map(
        Grid(
            columns=("trait", traits),
            rows=("model", models),
            values=_values(items, models, traits, values),
            value_label=label,
            first_row="top",
        ),
        name=name,
        title=title,
        caption=caption,
    )


def _values(
    items: Sequence[TraitInModel],
    models: Sequence[str],
    traits: Sequence[str],
    values: dict[int, float],
) -> list[list[float]]:
    by_pair = {(items[i].model, items[i].trait): value for i, value in values.items()}
    return [[by_pair.get((model, trait), math.nan) for trait in traits] for model in models]


def _cosine_map(cosines: Cosines, what: str) -> Figure:
    layers = sorted(set(cosines.layers))
    at = f"layer {layers[0]}" if len(layers) == 1 else "equal share of depth"
    names = [
        name if len(layers) == 1 else f"{name} @ {layer}"
        for name, layer in zip(cosines.names, cosines.layers, strict=True)
    ]
    return heat_map(
        Grid(
            columns=(what, cosines.names),
            rows=(what, names),
            values=cosines.cosines,
            value_label="cosine",
            limits=(-1.0, 1.0),
            scale="signed",
            digits=2,
            first_row="top",
        ),
        name=f"grid_{what}_{cosines.of}",
        title=f"Cosines between {what}: {cosines.of}",
        caption=f"Vectors averaged over seeds, at {at}.",
    )


def _steering(
    numbers: GridNumbers, sweeps: Sequence[tuple[GridCell, SweepSummary]], name: str
) -> Section:
    columns = ("model", "trait", "seed", "layer", "coef", "trait score (95 %)",
               "coherence (95 %)", "unsteered (95 %)", "random vector (95 %)")  # fmt: skip
    rows: list[tuple[Cell, ...]] = [
        (
            cell.model, cell.trait, cell.seed, cell.where or "none", cell.coef, cell.score,
            cell.coherence, cell.unsteered, cell.random,
        )
        for cell in numbers.steering
    ]  # fmt: skip
    picked = sum(cell.score is not None for cell in numbers.steering)
    return Section(
        id="grid-steering",
        title="Steering: the best point of every run",
        summary=f"In {picked} of {len(sweeps)} evaluations a point kept enough coherence.",
        figures=tuple(_curves(sweeps)),
        tables=(
            ("Picked points, read on held-out questions", Table(columns=columns, rows=tuple(rows))),
        ),
        source=f"grid {name}",
    )


def _curves(sweeps: Sequence[tuple[GridCell, SweepSummary]]) -> Iterator[Figure]:
    """Yield small multiples: a panel per model and trait, with a line for each seed."""

    def place(item: tuple[GridCell, SweepSummary]) -> tuple[str, str]:
        return item[0].trait, item[0].model

    panels = [
        Panel(
            label=f"{trait}, {model}",
            lines=[line for cell, sweep in own for line in _lines(cell, sweep)],
            limits=SCORE_AXIS,
        )
        for (trait, model), own in groupby(sorted(sweeps, key=place), key=place)
    ]
    if 0 < len(panels) <= _MULTIPLES:
        yield line_chart(
            name="grid_curves",
            title="Trait and coherence by coefficient",
            caption="Mean scores at the picked layer (without a pick, at the first), a line for "
            "each seed; dashed: a random vector of the same norm.",
            x=XAxis(label="coefficient"),
            panels=panels,
            columns=2 if len(panels) in (2, 4) else min(len(panels), 3),
        )


def _lines(cell: GridCell, sweep: SweepSummary) -> Iterator[Line]:
    steered = sweep.having("steered")
    if steered:
        layers = sweep.picks[0].point.layers if sweep.picks else steered[0].layers
        yield sweep_line(steered, layers, sweep, cell.trait, label="trait")
        if COHERENCE in sweep.metrics:
            yield sweep_line(steered, layers, sweep, COHERENCE, label="coherence")
        for line in control_line(steered, layers, sweep, cell.trait, control_of="trait"):
            yield Line(label="random vector", x=line.x, points=line.points, control_of="trait")


def _shifts(numbers: GridNumbers, name: str) -> Section:
    columns = ("model", "checkpoint", "trait", "seed", "layer", "shift (95 %)", "prompts")
    rows = tuple(
        (
            item.model, model_label(item.checkpoint), item.trait, item.seed, item.layer,
            Difference.of(item.shift), item.shift.n,
        )
        for item in numbers.shifts
    )  # fmt: skip
    furthest = max(numbers.shifts, key=lambda item: abs(item.shift.mean))
    return Section(
        id="grid-shifts",
        title="Finetuning shift of every checkpoint along every trait",
        summary=(
            f"{model_label(furthest.checkpoint)} moved furthest, along {furthest.trait}: "
            f"{furthest.shift.mean:+.3g} at layer {furthest.layer}."
        ),
        figures=tuple(_shift_maps(numbers.shifts)),
        tables=(("Shifts", Table(columns=columns, rows=rows)),),
        source=f"grid {name}",
    )


def _shift_maps(shifts: Sequence[ShiftCell]) -> Iterator[Figure]:
    """Yield checkpoints by traits, one figure per base model; the mean over seeds and layers."""
    for model in dict.fromkeys(item.model for item in shifts):
        own = [item for item in shifts if item.model == model]
        traits = list(dict.fromkeys(item.trait for item in own))
        names = list(dict.fromkeys(item.checkpoint for item in own))
        values = [
            [_mean([i.shift.mean for i in own if (i.checkpoint, i.trait) == (name, trait)])
             for trait in traits]
            for name in names
        ]  # fmt: skip
        most = max(abs(value) for row in values for value in row if not math.isnan(value))
        yield heat_map(
            Grid(
                columns=("trait", traits),
                rows=("checkpoint", [model_label(name) for name in names]),
                values=values,
                value_label="shift",
                limits=(-most, most) if most else (-1.0, 1.0),
                scale="signed",
                digits=2,
                first_row="top",
            ),
            name=f"grid_shift_{model}",
            title=f"Shift from {model}",
            caption="Projection of the last prompt token, checkpoint minus base; the mean over "
            "seeds and layers. Traits have vectors of their own: compare within a column.",
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _cells(cells: Sequence[GridCell], name: str) -> Section:
    rows = tuple(
        (cell.command, cell.model, cell.trait, str(cell.seed), cell.run, cell.state, cell.reason)
        for cell in cells
    )
    columns = ("command", "model", "trait", "seed", "run", "state", "reason")
    return Section(
        id="grid-cells",
        title="Every run of the grid",
        summary="`pvec report` of a run's folder shows its answers.",
        tables=(("Runs", Table(columns=columns, rows=rows)),),
        source=f"grid {name}",
    )
