"""``pvec project --prompts``: monitoring, before there is an answer (paper, section 3.3, table 2).

How far the last prompt token points along a vector, against how much of the trait the answers to
that prompt show: over all prompts, and within a condition (one system prompt, one number of shots),
where the differences between conditions cannot help.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pvec.core.conversations import Ids
from pvec.core.stats import Correlation, correlation, within_group_correlation
from pvec.errors import InputError
from pvec.io.csv_records import encode_row
from pvec.io.files import atomic_write
from pvec.io.responses import ResponseRecord
from pvec.io.runs import Run
from pvec.io.traits import Trait, load_trait
from pvec.report.projections import PROMPTS_KIND, write_summary
from pvec.settings import Settings
from pvec.types import Progress
from pvec.workflows.engine import Engine, Say, silent
from pvec.workflows.generating import Wanted, derive_seed, generate_missing
from pvec.workflows.judging import COHERENCE_METRIC, Metric
from pvec.workflows.project_input import RunSource, Source, open_source
from pvec.workflows.project_samples import Prompt, Samples, open_samples
from pvec.workflows.projector import Directions, open_directions, projector
from pvec.workflows.scoring import JudgeDesk, JudgeReport, keep_traits

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True)
class PromptPoint:
    """One prompt: its condition, its mean trait score over ``answers``, and its projections by
    layer.
    """

    prompt: str
    condition: str
    answers: int
    score: float
    projections: Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class MonitorColumn:
    """How well one vector at one layer foretells a trait's score: over all prompts, and within a
    condition.
    """

    vector: str
    layer: int
    metric: str
    overall: Correlation
    within: Correlation


@dataclass(frozen=True, kw_only=True)
class MonitorResult:
    """What monitoring found. ``columns`` is empty when nothing was judged (yet)."""

    run: Path
    model: str
    prompts: int
    conditions: int
    generated: int
    columns: tuple[MonitorColumn, ...] = ()
    points: Mapping[str, tuple[PromptPoint, ...]] = field(default_factory=dict)
    """Vector → its prompts."""
    judge: JudgeReport | None = None
    next: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Study:
    """What the prompts are to be compared with.

    ``traits`` are judged on generated answers (default: those that the vectors are named after);
    ``score`` names a column of the file that holds scores already, so that nothing is generated.
    ``condition`` names the column of conditions (default: the system prompt). ``out`` is the run.
    """

    traits: tuple[str, ...] = ()
    score: str | None = None
    condition: str = "condition"
    out: Path | None = None
    skip_bad: bool = False


def run(
    settings: Settings,
    path: Path,
    vectors: Sequence[str | Path],
    *,
    study: Study = Study(),
    say: Say = silent,
    on_progress: OnProgress = silent,
) -> MonitorResult:
    """Compare the prompts of ``path`` along ``vectors`` with the scores of answers to them.

    A run that was judged brings prompts, conditions and scores; any other file brings prompts, and
    scores in a column or from answers that are generated and judged now. Raises ``InputError``,
    ``ModelError``, ``JudgeError`` or ``StoreError`` for wrong input before weights are loaded.
    """
    source = open_source(path, settings.project)
    with ExitStack() as stack:
        engine = stack.enter_context(Engine(settings, say=say, on_progress=on_progress))
        directions = open_directions(settings, vectors, engine, say=say)
        monitoring = _Monitoring(settings, engine, directions, study, say, on_progress)
        folder = study.out or _run_folder(settings, path, engine)
        if isinstance(source, RunSource):
            known = _from_run(source.run)
            if not known.scores:
                raise InputError(f"{path} has no scores yet: score it with `pvec judge {path}`.")
            store = stack.enter_context(_open_run(folder, settings, path, engine))
            return monitoring.compare(store, known)
        samples = open_samples(source, engine, skip_bad=study.skip_bad)
        conditions = _conditions(samples, study.condition)
        if study.score is not None:
            scores = {study.score: _column_scores(source, samples, study.score)}
            known = _Known(prompts=samples.distinct, conditions=conditions, scores=scores)
            store = stack.enter_context(_open_run(folder, settings, path, engine))
            return monitoring.compare(store, known)
        desk = monitoring.desk(stack)
        store = stack.enter_context(_open_run(folder, settings, path, engine))
        return monitoring.generate(store, samples, conditions, desk)


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What is known of the prompts, by key: themselves, their conditions, and by metric the scores
    of the answers to them.
    """

    prompts: Mapping[str, Prompt]
    conditions: Mapping[str, str]
    scores: Mapping[str, Mapping[str, list[float]]]


class _Monitoring:
    """One call: scores by prompt, projections of the prompts, correlations, files."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        directions: Directions,
        study: Study,
        say: Say,
        on_progress: OnProgress,
    ) -> None:
        self.settings = settings
        self.engine = engine
        self.directions = directions
        self.study = study
        self.say = say
        self.on_progress = on_progress

    def desk(self, stack: ExitStack) -> JudgeDesk | None:
        """Return the judge, checked before anything is generated, or None when none is wanted."""
        if not self.settings.project.judge:
            return None
        bundled = self.engine.facts.bundled
        desk = JudgeDesk(self.settings, engine=self.engine, bundled=bundled, say=self.say)
        stack.enter_context(desk).check()
        return desk

    def generate(
        self,
        store: Run,
        samples: Samples,
        conditions: Mapping[str, str],
        desk: JudgeDesk | None,
    ) -> MonitorResult:
        """Generate answers to the prompts and judge them, then use their scores."""
        settings, engine, traits = self.settings, self.engine, self._traits()
        store.begin_session(command=sys.argv)
        keep_traits(store, traits)
        store.update_manifest(settings=settings.model_dump(mode="json"), model=_model(engine))
        wanted = [
            _wanted(prompt, conditions[key], rollout, settings, engine, trait=traits[0].name)
            for key, prompt in samples.distinct.items()
            for rollout in range(settings.project.rollouts)
        ]
        made = generate_missing(
            store, engine, wanted, on_progress=self.on_progress, stage="answers"
        )
        report = None
        if desk is not None:
            metrics = [*(Metric(name=t.name, prompt=t.eval_prompt) for t in traits)]
            records = list(store.responses())
            report = desk.score(
                store, records, [*metrics, COHERENCE_METRIC], on_progress=self.on_progress
            )
        result = self.compare(store, _from_run(store))
        store.end_session(timings={})
        return dataclasses.replace(result, generated=made, judge=report)

    def _traits(self) -> list[Trait]:
        """Return the traits to judge: those named, else those that the vectors are of."""
        names = self.study.traits or tuple(
            dict.fromkeys(vector.trait for vector in self.directions.vectors.values())
        )
        return [load_trait(name) for name in names]

    def compare(self, store: Run, known: _Known) -> MonitorResult:
        """Correlate the prompts' projections with their scores, and write what was found."""
        folder = store.path
        result = MonitorResult(
            run=folder,
            model=self.engine.facts.id,
            prompts=len(known.prompts),
            conditions=len(set(known.conditions.values())),
            generated=0,
            next=(f"pvec judge {folder}",),
        )
        if not known.scores:
            return result
        metrics = {name: self._metric(name, known) for name in self.directions.vectors}
        values = self._projections(known.prompts)
        points = {
            name: tuple(self._points(known, metrics[name], values[:, number]))
            for number, name in enumerate(self.directions.vectors)
        }
        columns = tuple(
            _column(name, layer, metrics[name], points[name])
            for name in points
            for layer in self.directions.layers
        )
        report = (f"pvec report {folder}",)
        result = dataclasses.replace(result, columns=columns, points=points, next=report)
        write_summary(folder, dataclasses.asdict(result))
        _write_points(folder, result)
        return result

    def _projections(self, prompts: Mapping[str, Prompt]) -> np.ndarray:
        """Return the last prompt token's projections ``[prompts, vectors, layers]``."""
        project = projector(
            self.engine, self.directions.plan_of("prompt_last_proj"), self.settings, turns="last"
        )
        made = project([Ids(prompt_ids=p.ids, answer_ids=()) for p in prompts.values()])
        table = np.array([turns[0] for turns in made.rows], dtype=np.float64)
        return table.reshape(len(prompts), len(self.directions.vectors), -1)

    def _metric(self, name: str, known: _Known) -> str:
        """Return the score that a vector is compared with: its own trait's, or the only one."""
        trait = self.directions.vectors[name].trait
        if trait in known.scores:
            return trait
        if len(known.scores) != 1:
            raise InputError(
                f"There is no score of {trait!r} to compare the vector {name!r} with, only of "
                f"{', '.join(known.scores)}: judge that trait (--trait), or leave the vector away."
            )
        return next(iter(known.scores))

    def _points(self, known: _Known, metric: str, values: np.ndarray) -> Iterator[PromptPoint]:
        """Yield the prompts that have a score; ``values`` is ``[prompts, layers]``."""
        mine = known.scores[metric]
        for row, (key, prompt) in enumerate(known.prompts.items()):
            if found := mine.get(key):
                layers = zip(self.directions.layers, values[row].tolist(), strict=True)
                yield PromptPoint(
                    prompt=prompt.text,
                    condition=known.conditions[key],
                    answers=len(found),
                    score=float(np.mean(found)),
                    projections=dict(layers),
                )


def _column(vector: str, layer: int, metric: str, points: Sequence[PromptPoint]) -> MonitorColumn:
    x = [point.projections[layer] for point in points]
    y = [point.score for point in points]
    groups = [point.condition for point in points]
    return MonitorColumn(
        vector=vector,
        layer=layer,
        metric=metric,
        overall=correlation(x, y),
        within=within_group_correlation(x, y, groups),
    )


def _from_run(run: Run) -> _Known:
    """Return a run's distinct prompts, their conditions, and their scores by metric."""
    found = run.scores_by_response() if run.judges() else {}
    prompts: dict[str, Prompt] = {}
    conditions: dict[str, str] = {}
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in run.responses():
        if record.steering:
            continue  # a steered answer says nothing about what the prompt alone does
        key = record.prompt
        prompts.setdefault(key, _recorded(record))
        conditions.setdefault(key, str(record.condition.get("condition", record.system or "none")))
        for metric, score in found.get(record.id, {}).items():
            if score.score is not None and metric != COHERENCE_METRIC.name:
                scores[metric][key].append(score.score)
    return _Known(
        prompts=prompts,
        conditions=conditions,
        scores={metric: dict(rows) for metric, rows in scores.items()},
    )


def _recorded(record: ResponseRecord) -> Prompt:
    return Prompt(
        key=record.prompt,
        text=record.prompt,
        ids=record.prompt_ids,
        system=record.system,
        question=record.question,
    )


def _conditions(samples: Samples, column: str) -> dict[str, str]:
    """Return each prompt's condition: its cell in ``column`` if there is one, else its system
    prompt.
    """
    found: dict[str, str] = {}
    for key, entry in zip(samples.prompts, samples.entries(), strict=True):
        system = samples.distinct[key].system or "none"
        found.setdefault(key, str(entry.row.values.get(column, system)))
    return found


def _column_scores(source: Source, samples: Samples, column: str) -> dict[str, list[float]]:
    if column not in source.columns:
        raise InputError(
            f"{source.path} lacks the column {column!r}: it has {', '.join(source.columns)}."
        )
    scores: dict[str, list[float]] = defaultdict(list)
    for key, entry in zip(samples.prompts, samples.entries(), strict=True):
        cell = entry.row.values.get(column)
        if cell is None or not str(cell).strip():
            continue
        try:
            scores[key].append(float(cell))
        except ValueError:
            raise InputError(
                f"{source.path}:{entry.row.line} has {cell!r} as its {column!r}, not a number."
            ) from None
    return dict(scores)


def _wanted(
    prompt: Prompt, condition: str, rollout: int, settings: Settings, engine: Engine, *, trait: str
) -> Wanted:
    seed = derive_seed(settings.generation.seed, "monitor", prompt.question, rollout)
    return Wanted(
        trait=trait,
        condition={"condition": condition, "rollout": rollout},
        question=prompt.question,
        question_id=prompt.key,
        system=prompt.system,
        prompt=prompt.text,
        prompt_ids=prompt.ids,
        sampling=engine.sampling(seed),
        engine=engine.identity,
    )


def _write_points(folder: Path, result: MonitorResult) -> None:
    """Write ``prompts.csv``: every prompt with its projections and its score."""
    layers = [f"prompt_last_proj_layer{c.layer}" for c in result.columns]
    layers = list(dict.fromkeys(layers))
    with atomic_write(folder / "prompts.csv") as stream:
        header = ["vector", "condition", "answers", "score", *layers, "prompt"]
        stream.write(encode_row(header) + b"\n")
        for name, points in result.points.items():
            for point in points:
                values = [repr(value) for value in point.projections.values()]
                cells = [name, point.condition, str(point.answers), repr(point.score), *values]
                stream.write(encode_row([*cells, point.prompt]) + b"\n")


def _run_folder(settings: Settings, path: Path, engine: Engine) -> Path:
    names = ["monitor", path.resolve().stem, Path(settings.model.id).name]
    if engine.facts.adapter:
        names.append(Path(engine.facts.adapter).name)
    return settings.paths.runs / re.sub(r"[^\w.+-]+", "-", "-".join(names)).lower()


def _open_run(folder: Path, settings: Settings, path: Path, engine: Engine) -> Run:
    generation = settings.generation
    return Run.open_or_create(
        folder,
        kind=PROMPTS_KIND,
        identity={
            "trait": path.resolve().stem,
            "model": engine.facts.id,
            "adapter": engine.facts.adapter,
            "engine": engine.identity,
            "temperature": generation.temperature,
            "top_p": generation.top_p,
            "max_tokens": engine.max_tokens,
            "seed": generation.seed,
            "thinking": generation.thinking,
        },
    )


def _model(engine: Engine) -> dict[str, str | bool | None]:
    facts = engine.facts
    return {
        "id": facts.id,
        "fingerprint": facts.fingerprint,
        "adapter": facts.adapter,
        "bundled": facts.bundled,
    }
