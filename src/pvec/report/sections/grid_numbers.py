"""The numbers of a grid: scores, suggested layers, how alike vectors are, picked points, shifts.

Everything is read from the runs of the cells that are done. Cosines are between vectors of the
kind ``response_avg``:

- between seeds: of one model and trait, at the lower median of the layers suggested for its seeds;
- between traits: of one model, means over seeds, at the lower median of the layers suggested for
  all its vectors;
- between models of one width: of one trait, means over seeds, each at the layer nearest to the mean
  of the models' suggested shares of depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from statistics import fmean, median_low

import numpy as np

from pvec.evaluation.summary import COHERENCE, SweepSummary
from pvec.judges.scoring import score_of
from pvec.report.sections.common import RunData, interval_of
from pvec.report.sections.shift import SHIFT_SHAPE
from pvec.report.sections.steer_eval import read
from pvec.runs.grid import GridCell, GridFolder
from pvec.runs.store import Run
from pvec.runs.summary import read_summary
from pvec.stats import SCORES, Interval, grouped_mean
from pvec.types import SIGNS, Sign
from pvec.vectors.files import load_vector
from pvec.vectors.quality import suggest_layer, summarize
from pvec.vectors.show import cosine_matrix
from pvec.vectors.vector import PersonaVector


@dataclass(frozen=True, kw_only=True)
class SeedVector:
    """The vector of one cell: its suggested layer, and there the cosine between the vectors of two
    halves of the questions, with its central 95 %.
    """

    seed: int
    run: str
    kept: Mapping[Sign, int]
    layer: int | None
    split_half: Interval | None


@dataclass(frozen=True, kw_only=True)
class TraitInModel:
    """One model and trait over all seeds.

    Mean trait scores with 95 % intervals over questions, None where no run has them. ``layer`` is
    where the seeds' vectors are compared, ``depth`` the same as a share of all layers;
    ``seed_cosine`` the mean cosine of pairs of seeds with the least and the greatest.
    """

    model: str
    trait: str
    positive: Interval | None
    negative: Interval | None
    unsteered: Interval | None
    num_layers: int | None
    layer: int | None
    depth: float | None
    seed_cosine: Interval | None
    seeds: tuple[SeedVector, ...]


@dataclass(frozen=True, kw_only=True)
class Cosines:
    """Cosines between the traits of a model, or between models for a trait: ``of`` says which.

    ``cosines[i][j]`` is between ``names[i]`` at ``layers[i]`` and ``names[j]`` at ``layers[j]``.
    """

    of: str
    names: tuple[str, ...]
    layers: tuple[int, ...]
    cosines: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class SteeredCell:
    """The picked point of a sweep, read on held-out questions, or the ``reason`` for none."""

    model: str
    trait: str
    seed: int
    run: str
    where: str = ""
    coef: float | None = None
    score: Interval | None = None
    coherence: Interval | None = None
    unsteered: Interval | None = None
    random: Interval | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class ShiftCell:
    """The shift of one checkpoint along the vector of one trait and seed, at a layer."""

    model: str
    trait: str
    seed: int
    run: str
    checkpoint: str
    layer: int
    shift: Interval


@dataclass(frozen=True, kw_only=True)
class GridNumbers:
    """All numbers of a grid. ``cells`` are all of its cells, whatever their state."""

    folder: Path
    cells: tuple[GridCell, ...]
    traits: tuple[TraitInModel, ...]
    trait_cosines: tuple[Cosines, ...]
    model_cosines: tuple[Cosines, ...]
    steering: tuple[SteeredCell, ...]
    shifts: tuple[ShiftCell, ...]


@dataclass(kw_only=True)
class GridRuns:
    """The finished runs of a grid, each read once. ``judge`` chooses among several judges."""

    grid: GridFolder
    judge: str | None

    def done(self, command: str) -> list[GridCell]:
        """Return the finished cells of a command."""
        return [cell for cell in self.grid.of(command) if cell.state == "done"]

    def run(self, cell: GridCell) -> RunData:
        """Return a cell's run. Raises ``StoreError`` where it is gone or damaged."""
        run = Run.read(self.grid.path / cell.run)
        return RunData(run=run, judge=run.choose_judge(self.judge))

    @cached_property
    def vectors(self) -> dict[tuple[str, str, int], PersonaVector]:
        """The vectors by model, trait and seed."""
        files = {
            (cell.model, cell.trait, cell.seed): self.run(cell).run.vector_path(cell.trait)
            for cell in self.done("extract")
        }
        return {key: load_vector(file) for key, file in files.items() if file.is_file()}

    @cached_property
    def sweeps(self) -> list[tuple[GridCell, SweepSummary]]:
        """The judged sweeps."""
        runs = ((cell, self.run(cell)) for cell in self.done("steer-eval"))
        return [(cell, read(run)[1]) for cell, run in runs if run.judge is not None]

    def scores(
        self,
        command: str,
        model: str,
        trait: str,
        *,
        counts: Callable[[Mapping[str, object]], bool],
    ) -> Interval | None:
        """Return the mean trait score of the answers whose condition ``counts``, over all seeds."""
        answers = [
            (question, score)
            for condition, question, score in self._answers.get((command, model, trait), [])
            if counts(condition)
        ]
        if all(score is None for _, score in answers):
            return None
        questions, values = zip(*answers, strict=True)
        return grouped_mean(values, groups=questions, limits=SCORES)

    @cached_property
    def _answers(self) -> dict[tuple[str, str, str], list[Answered]]:
        """Condition, question and trait score of every answer, by command, model and trait."""
        found: dict[tuple[str, str, str], list[Answered]] = {}
        for cell in (*self.done("extract"), *self.done("steer-eval")):
            data = self.run(cell)
            scores = data.run.scores_by_response(judge=data.judge)
            own = found.setdefault((cell.command, cell.model, cell.trait), [])
            for record in data.run.responses():
                score = score_of(scores.get(record.id, {}), cell.trait)
                own.append((record.condition, record.question_id, score))
        return found


Answered = tuple[Mapping[str, object], str, float | None]


def grid_numbers(runs: GridRuns) -> GridNumbers:
    """Compute the numbers of a grid from its runs."""
    pairs = list(dict.fromkeys((cell.model, cell.trait) for cell in runs.grid.cells))
    traits = tuple(_trait_in_model(runs, model, trait) for model, trait in pairs)
    return GridNumbers(
        folder=runs.grid.path,
        cells=runs.grid.cells,
        traits=traits,
        trait_cosines=tuple(_trait_cosines(runs)),
        model_cosines=tuple(_model_cosines(runs, traits)),
        steering=tuple(cell for pair in runs.sweeps for cell in _steered(*pair)),
        shifts=tuple(shift for cell in runs.done("shift") for shift in _shifts(runs, cell)),
    )


def _trait_in_model(runs: GridRuns, model: str, trait: str) -> TraitInModel:
    own = {
        cell.seed: cell
        for cell in runs.done("extract")
        if (cell.model, cell.trait) == (model, trait)
    }
    vectors = {
        seed: runs.vectors[model, trait, seed]
        for seed in own
        if (model, trait, seed) in runs.vectors
    }
    layers = [layer for v in vectors.values() if (layer := suggest_layer(v)[0]) is not None]
    layer = median_low(layers) if layers else None
    depth = next((v.num_layers for v in vectors.values()), None)
    positive, negative = (
        runs.scores("extract", model, trait, counts=lambda c, sign=sign: c["sign"] == sign)  # type: ignore[misc]
        for sign in SIGNS
    )
    return TraitInModel(
        model=model,
        trait=trait,
        positive=positive,
        negative=negative,
        unsteered=runs.scores(
            "steer-eval", model, trait, counts=lambda c: c.get("role") == "baseline"
        ),
        num_layers=depth,
        layer=layer,
        depth=layer / depth if layer is not None and depth else None,
        seed_cosine=_seed_cosine([v.row(layer) for v in vectors.values()]) if layer else None,
        seeds=tuple(_seed_vector(own[seed], vector) for seed, vector in vectors.items()),
    )


def _seed_vector(cell: GridCell, vector: PersonaVector) -> SeedVector:
    summary = summarize(vector)
    layer, half = summary.suggested_layer, None
    if layer is not None and not math.isnan(summary.layers[layer].stability.mean):
        half = Interval(**vars(summary.layers[layer].stability), n=1, groups=1)
    return SeedVector(
        seed=cell.seed, run=cell.run, kept=summary.counts, layer=layer, split_half=half
    )


def _seed_cosine(rows: Sequence[np.ndarray]) -> Interval | None:
    """Return mean, least and greatest cosine over the pairs of seeds; None for one seed."""
    matrix = cosine_matrix(rows) if len(rows) > 1 else np.empty((0, 0))
    pairs = [float(matrix[i, j]) for i, j in combinations(range(len(matrix)), 2)]
    if not pairs:
        return None
    low, high = (min(pairs), max(pairs)) if len(pairs) > 1 else (math.nan, math.nan)
    return Interval(mean=fmean(pairs), low=low, high=high, n=len(pairs), groups=len(rows))


def _trait_cosines(runs: GridRuns) -> Iterator[Cosines]:
    """Yield, for each model with several traits, the cosines between them."""
    for model in dict.fromkeys(key[0] for key in runs.vectors):
        own = [vector for key, vector in runs.vectors.items() if key[0] == model]
        layers = [layer for v in own if (layer := suggest_layer(v)[0]) is not None]
        traits = tuple(dict.fromkeys(key[1] for key in runs.vectors if key[0] == model))
        if layers and len(traits) > 1:
            layer = median_low(layers)
            rows = [_mean_row(runs, model, trait, layer) for trait in traits]
            yield _cosines(model, traits, [layer] * len(traits), rows)


def _model_cosines(runs: GridRuns, traits: Sequence[TraitInModel]) -> Iterator[Cosines]:
    """Yield, for each trait and width of which there are several models, the cosines between
    them.
    """
    by_width: dict[tuple[str, int], list[TraitInModel]] = {}
    for item in traits:
        if item.depth is not None:
            width = runs.vectors[item.model, item.trait, item.seeds[0].seed].hidden_size
            by_width.setdefault((item.trait, width), []).append(item)
    for (trait, width), items in by_width.items():
        if len(items) > 1:
            share = fmean(item.depth for item in items if item.depth is not None)
            layers = [max(1, round(share * (item.num_layers or 1))) for item in items]
            rows = [
                _mean_row(runs, item.model, trait, layer)
                for item, layer in zip(items, layers, strict=True)
            ]
            several = len([key for key in by_width if key[0] == trait]) > 1
            of = f"{trait}, width {width}" if several else trait
            yield _cosines(of, tuple(item.model for item in items), layers, rows)


def _mean_row(runs: GridRuns, model: str, trait: str, layer: int) -> np.ndarray:
    """Return the mean over seeds of a model's vectors of a trait at a layer, float64 ``[H]``."""
    own = [v.row(layer) for key, v in runs.vectors.items() if key[:2] == (model, trait)]
    mean: np.ndarray = np.mean(np.array(own, dtype=np.float64), axis=0)
    return mean


def _cosines(
    of: str, names: tuple[str, ...], layers: Sequence[int], rows: Sequence[np.ndarray]
) -> Cosines:
    matrix = tuple(tuple(float(c) for c in row) for row in cosine_matrix(rows))
    return Cosines(of=of, names=names, layers=tuple(layers), cosines=matrix)


def _steered(cell: GridCell, sweep: SweepSummary) -> Iterator[SteeredCell]:
    about = {"model": cell.model, "trait": cell.trait, "seed": cell.seed, "run": cell.run}
    for pick in sweep.picks:
        yield SteeredCell(
            **about,  # type: ignore[arg-type]
            where=pick.point.where,
            coef=pick.point.coef,
            score=pick.point.scores[cell.trait],
            coherence=pick.point.scores.get(COHERENCE),
            unsteered=pick.baseline.scores[cell.trait] if pick.baseline else None,
            random=pick.control.scores[cell.trait] if pick.control else None,
        )
    for reason in sweep.unpicked:
        yield SteeredCell(**about, reason=reason)  # type: ignore[arg-type]


def _shifts(runs: GridRuns, cell: GridCell) -> Iterator[ShiftCell]:
    for item in read_summary(runs.grid.path / cell.run, shape=SHIFT_SHAPE)["shifts"]:
        yield ShiftCell(
            model=cell.model,
            trait=cell.trait,
            seed=cell.seed,
            run=cell.run,
            checkpoint=item["checkpoint"],
            layer=item["layer"],
            shift=interval_of(item["shift"]),
        )
