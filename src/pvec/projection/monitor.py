"""``pvec project --prompts``: monitoring, before there is an answer (paper, section 3.3, table 2).

How far the last prompt token points along a vector, against how much of the trait the answers to
that prompt show: over all prompts; within a condition (one system prompt, one number of shots),
where the differences between conditions cannot help; and within a question, where it is only they
that can.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pvec.backends.planned import OnProgress
from pvec.backends.run_session import manifest_sections
from pvec.backends.session import ModelSession, Notify, ignore
from pvec.data.conversations import Ids
from pvec.data.csv_table import encode_row
from pvec.errors import InputError
from pvec.judges.scoring import JudgeReport, ResponseScorer
from pvec.projection.inputs import RunSource, open_source
from pvec.projection.projector import (
    Directions,
    open_directions,
    projector,
    suggested_prompt_layer,
)
from pvec.projection.samples import Prompt, Samples, open_samples
from pvec.projection.scores import (
    KnownPrompts,
    answer_prompts,
    conditions_of,
    judge_prompts,
    known_from_column,
    known_from_run,
)
from pvec.projection.study import open_study, study_folder, study_identity
from pvec.runs.files import atomic_write
from pvec.runs.store import Run
from pvec.runs.summary import PROMPTS_KIND, write_summary
from pvec.settings import Settings
from pvec.stats import Correlation, correlation, within_group_correlation
from pvec.traits.trait import Trait, load_trait


@dataclass(frozen=True, kw_only=True)
class PromptPoint:
    """One prompt: what is asked in it, its condition, its mean trait score over ``answers``, and
    its projections by layer.
    """

    prompt: str
    question: str
    condition: str
    answers: int
    score: float
    projections: Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class MonitorColumn:
    """How well one vector at one layer foretells a trait's score: over all prompts, within a
    condition, and within a question (NaN where none is asked twice). ``suggested`` says that it is
    the layer which the vector's own extraction speaks for, before any of these scores is seen.
    """

    vector: str
    layer: int
    metric: str
    overall: Correlation
    within: Correlation
    same_question: Correlation
    suggested: bool = False


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
    notify: Notify = ignore,
    on_progress: OnProgress = ignore,
) -> MonitorResult:
    """Compare the prompts of ``path`` along ``vectors`` with the scores of answers to them.

    A run that was judged brings prompts, conditions and scores; any other file brings prompts, and
    scores in a column or from answers that are generated and judged now. Raises ``InputError``,
    ``ModelError``, ``JudgeError`` or ``StoreError`` for wrong input before weights are loaded.
    """
    source = open_source(path, settings.project)
    with ExitStack() as stack:
        session = stack.enter_context(
            ModelSession(settings, notify=notify, on_progress=on_progress)
        )
        directions = open_directions(
            settings, vectors, session, suggest=suggested_prompt_layer, notify=notify
        )
        monitoring = _Monitoring(settings, session, directions, study, notify, on_progress)
        folder = study.out or study_folder(settings, session, kind="monitor", path=path)
        identity = study_identity(session, path=path)

        def open_run() -> Run:
            return stack.enter_context(open_study(folder, kind=PROMPTS_KIND, identity=identity))

        if isinstance(source, RunSource):
            known = known_from_run(source.run)
            if not known.scores:
                raise InputError(f"{path} has no scores yet: score it with `pvec judge {path}`.")
            return monitoring.compare(open_run(), known)
        samples = open_samples(source, session, skip_bad=study.skip_bad)
        conditions = conditions_of(samples, study.condition)
        if study.score is not None:
            known = known_from_column(source, samples, study.score, conditions=conditions)
            return monitoring.compare(open_run(), known)
        scorer = monitoring.scorer(stack)
        return monitoring.generate(open_run(), samples, conditions, scorer)


class _Monitoring:
    """One call: scores by prompt, projections of the prompts, correlations, files."""

    def __init__(
        self,
        settings: Settings,
        session: ModelSession,
        directions: Directions,
        study: Study,
        notify: Notify,
        on_progress: OnProgress,
    ) -> None:
        self.settings = settings
        self.session = session
        self.directions = directions
        self.study = study
        self.notify = notify
        self.on_progress = on_progress

    def scorer(self, stack: ExitStack) -> ResponseScorer | None:
        """Return the judge, checked before anything is generated, or None when none is wanted."""
        if not self.settings.project.judge:
            return None
        bundled = self.session.metadata.bundled
        scorer = ResponseScorer(
            self.settings, session=self.session, bundled=bundled, notify=self.notify
        )
        stack.enter_context(scorer).check()
        return scorer

    def generate(
        self,
        store: Run,
        samples: Samples,
        conditions: Mapping[str, str],
        scorer: ResponseScorer | None,
    ) -> MonitorResult:
        """Generate answers to the prompts and judge them, then use their scores."""
        traits = self._traits()
        store.begin_session(**manifest_sections(self.session))
        store.keep_traits(traits)
        made = answer_prompts(
            store,
            self.session,
            self.settings,
            samples,
            conditions=conditions,
            trait=traits[0],
            on_progress=self.on_progress,
        )
        report = None
        if scorer is not None:
            report = judge_prompts(store, scorer, traits, on_progress=self.on_progress)
        known = known_from_run(store, judge=None if report is None else report.judge)
        result = self.compare(store, known)
        store.end_session(timings={})
        return dataclasses.replace(result, generated=made, judge=report)

    def _traits(self) -> list[Trait]:
        """Return the traits to judge: those named, else those that the vectors are of."""
        names = self.study.traits or tuple(
            dict.fromkeys(vector.trait for vector in self.directions.vectors.values())
        )
        return [load_trait(name) for name in names]

    def compare(self, store: Run, known: KnownPrompts) -> MonitorResult:
        """Correlate the prompts' projections with their scores, and write what was found."""
        folder = store.path
        result = MonitorResult(
            run=folder,
            model=self.session.metadata.id,
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
            self._column(name, layer, metrics[name], points[name])
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
            self.session, self.directions.plan_of("prompt_last_proj"), self.settings, turns="last"
        )
        made = project([Ids(prompt_ids=p.ids, answer_ids=()) for p in prompts.values()])
        table = np.array([turns[0] for turns in made.rows], dtype=np.float64)
        return table.reshape(len(prompts), len(self.directions.vectors), -1)

    def _metric(self, name: str, known: KnownPrompts) -> str:
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

    def _points(
        self, known: KnownPrompts, metric: str, values: np.ndarray
    ) -> Iterator[PromptPoint]:
        """Yield the prompts that have a score; ``values`` is ``[prompts, layers]``."""
        mine = known.scores[metric]
        for row, (key, prompt) in enumerate(known.prompts.items()):
            if found := mine.get(key):
                layers = zip(self.directions.layers, values[row].tolist(), strict=True)
                yield PromptPoint(
                    prompt=prompt.text,
                    question=prompt.question,
                    condition=known.conditions[key],
                    answers=len(found),
                    score=float(np.mean(found)),
                    projections=dict(layers),
                )

    def _column(
        self, name: str, layer: int, metric: str, points: Sequence[PromptPoint]
    ) -> MonitorColumn:
        x = [point.projections[layer] for point in points]
        y = [point.score for point in points]
        vector, kind = self.directions.vectors[name], self.directions.kind
        known = vector.mean_norm is not None
        return MonitorColumn(
            vector=name,
            layer=layer,
            metric=metric,
            overall=correlation(x, y),
            within=within_group_correlation(x, y, [point.condition for point in points]),
            same_question=within_group_correlation(x, y, [point.question for point in points]),
            suggested=known and suggested_prompt_layer(vector, kind=kind) == layer,
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
