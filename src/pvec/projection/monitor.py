"""``pvec monitor``: a trait read from the prompt, before any answer (paper, section 3.3).

How far the last prompt token points along a vector, against how much of the trait the answers to
that prompt show: over all prompts; within a condition (one system prompt, one number of shots),
where the differences between conditions cannot help; and within a question, where only they can.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pvec.backends.planned import OnProgress, PlannedResponse
from pvec.backends.run_session import RunSession, use_run_date
from pvec.backends.session import ModelSession, Notify, ignore
from pvec.data.conversations import Ids
from pvec.data.csv_table import write_csv
from pvec.errors import InputError
from pvec.judges.plan import RunPlan, plan_run
from pvec.judges.prompts import metrics_of
from pvec.judges.scoring import JudgeReport, ResponseScorer
from pvec.notebook import HtmlResult
from pvec.projection.inputs import (
    RunTable,
    Source,
    open_run,
    open_samples,
    open_source,
    study_folder,
    study_identity,
)
from pvec.projection.projector import (
    LoadedVectors,
    open_vectors,
    project_table,
    suggested_prompt_layer,
)
from pvec.projection.prompt_scores import PromptScores, conditions_of, planned_answers
from pvec.runs.summary import PROMPTS_KIND, write_summary
from pvec.settings import Settings
from pvec.stats import Correlation, correlation, within_group_correlation
from pvec.traits.trait import Trait, load_trait
from pvec.types import DEFAULT_OUTPUT, OutputOptions


@dataclass(frozen=True, kw_only=True)
class PromptPoint:
    """One prompt: its question, its condition, its mean trait score over ``answers``, and its
    projections by layer.
    """

    prompt: str
    question: str
    condition: str
    answers: int
    score: float
    projections: Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class MonitorColumn:
    """How well one vector at one layer predicts a trait's score: over all prompts, within a
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
class MonitorResult(HtmlResult):
    """The result of monitoring. ``columns`` is empty when nothing was judged (yet)."""

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


def run(  # noqa: PLR0913 (what to compare with: each is an option)
    settings: Settings,
    path: Path,
    vectors: Sequence[str | Path],
    *,
    traits: Sequence[str] = (),
    score: str | None = None,
    condition: str = "condition",
    output: OutputOptions = DEFAULT_OUTPUT,
    notify: Notify = ignore,
    on_progress: OnProgress = ignore,
) -> MonitorResult:
    """Compare the prompts of ``path`` along ``vectors`` with the scores of answers to them.

    A run that was judged brings prompts, conditions and scores; any other file brings prompts.
    ``traits`` are judged on answers that are generated now (default: those that the vectors are
    named after), unless ``score`` names a column that holds scores. ``condition`` names the column
    of conditions (default: the system prompt), ``output`` the run. Raises ``InputError``,
    ``ModelError``, ``JudgeError`` or ``StoreError`` for wrong input before weights are loaded.
    """
    source = open_source(path, settings.project)
    with ExitStack() as stack:
        session = stack.enter_context(
            ModelSession(settings, notify=notify, on_progress=on_progress)
        )
        loaded = open_vectors(session, vectors, suggest=suggested_prompt_layer)
        folder = study_folder(session, "monitor", path=path, out=output.out)
        known, planned, judged = _scores_or_answers(
            session, loaded, source, folder,
            traits=traits, score=score, condition=condition, skip_bad=output.skip_bad,
        )  # fmt: skip
        scorer = None
        if known is None and settings.project.judge:
            scorer = stack.enter_context(
                ResponseScorer.of(session, vectors=loaded.vectors.values())
            )
            scorer.check(metrics_of(*judged))
        identity = study_identity(session, path)
        work = stack.enter_context(
            open_run(session, folder, kind=PROMPTS_KIND, identity=identity, traits=judged)
        )
        if known is not None:
            return _compare(work, loaded, known)
        return _generate(work, loaded, planned, judged, scorer)


def plan(
    settings: Settings,
    path: Path,
    vectors: Sequence[str | Path],
    *,
    traits: Sequence[str] = (),
    score: str | None = None,
    condition: str = "condition",
    output: OutputOptions = DEFAULT_OUTPUT,
    notify: Notify = ignore,
) -> RunPlan:
    """Say what ``run`` would generate and judge; loads no weights, asks nobody, writes nothing."""
    source = open_source(path, settings.project)
    with ModelSession(settings, notify=notify) as session:
        loaded = open_vectors(session, vectors, suggest=suggested_prompt_layer)
        folder = study_folder(session, "monitor", path=path, out=output.out)
        known, planned, judged = _scores_or_answers(
            session, loaded, source, folder,
            traits=traits, score=score, condition=condition, skip_bad=output.skip_bad,
        )  # fmt: skip
        return plan_run(
            session,
            folder,
            kind=PROMPTS_KIND,
            identity=study_identity(session, path),
            planned=planned,
            metrics=metrics_of(*judged),
            judged=known is None and settings.project.judge,
            vectors=loaded.vectors.values(),
        )


def _scores_or_answers(
    session: ModelSession,
    vectors: LoadedVectors,
    source: Source,
    folder: Path,
    *,
    traits: Sequence[str],
    score: str | None,
    condition: str,
    skip_bad: bool,
) -> tuple[PromptScores | None, list[PlannedResponse], list[Trait]]:
    """Return the prompts' scores where the input has them; else the answers to generate, and the
    traits to judge them on.
    """
    if isinstance(source.table, RunTable):
        known = PromptScores.from_run(source.table.run)
        if not known.scores:
            place = source.path
            raise InputError(f"{place} has no scores yet: score it with `pvec judge {place}`.")
        return known, [], []
    use_run_date(session, folder)
    samples = open_samples(source, session, skip_bad=skip_bad)
    conditions = conditions_of(samples, condition)
    if score is not None:
        return PromptScores.from_column(samples, score, conditions=conditions), [], []
    names = traits or dict.fromkeys(vector.trait for vector in vectors.vectors.values())
    judged = [load_trait(name) for name in names]
    prompts = list(samples.distinct.values())
    trait = judged[0].name
    return None, planned_answers(session, prompts, conditions=conditions, trait=trait), judged


def _generate(
    work: RunSession,
    vectors: LoadedVectors,
    planned: Sequence[PlannedResponse],
    traits: Sequence[Trait],
    scorer: ResponseScorer | None,
) -> MonitorResult:
    """Generate answers to the prompts, judge them, and compare with their scores."""
    generated = work.generate(planned, stage="answers")
    report = None
    if scorer is not None:
        with work.store.stage("judge"):
            report = scorer.score(
                work.store,
                list(work.store.responses()),
                metrics_of(*traits),
                on_progress=work.session.on_progress,
            )
    known = PromptScores.from_run(
        work.store,
        judge=None if report is None else report.judge,
        order=list(dict.fromkeys(response.prompt for response in planned)),
    )
    result = _compare(work, vectors, known)
    return dataclasses.replace(result, generated=generated, judge=report)


def _compare(work: RunSession, vectors: LoadedVectors, known: PromptScores) -> MonitorResult:
    """Correlate the prompts' projections with their scores, and write the result."""
    folder = work.store.path
    work.store.update_manifest(projection_axes=vectors.axes())
    result = MonitorResult(
        run=folder,
        model=work.session.metadata.id,
        prompts=len(known.prompts),
        conditions=len(set(known.conditions.values())),
        generated=0,
        next=(f"pvec judge {folder}",),
    )
    if not known.scores:
        return result
    metrics = {name: _metric(name, vectors, known) for name in vectors.vectors}
    table = project_table(
        work.session,
        vectors.plan_of("prompt_last_proj"),
        (Ids(prompt_ids=prompt.ids, answer_ids=()) for prompt in known.prompts.values()),
        total=len(known.prompts),
        stage="prompts: projecting",
    ).reshape(len(known.prompts), len(vectors.vectors), -1)
    points = {
        name: tuple(_points(known, metrics[name], vectors.layers, table[:, number]))
        for number, name in enumerate(vectors.vectors)
    }
    result = dataclasses.replace(
        result,
        columns=tuple(
            _column(vectors, name, layer, metrics[name], points[name])
            for name, layer in vectors.columns
        ),
        points=points,
        next=(f"pvec report {folder}",),
    )
    write_summary(folder, dataclasses.asdict(result))
    layers = [f"prompt_last_proj_layer{layer}" for layer in vectors.layers]
    write_csv(
        folder / "prompts.csv",
        ["vector", "condition", "answers", "score", *layers, "prompt"],
        (
            (name, p.condition, p.answers, p.score, *p.projections.values(), p.prompt)
            for name, several in points.items()
            for p in several
        ),
    )
    return result


def _metric(name: str, vectors: LoadedVectors, known: PromptScores) -> str:
    """Return the score that a vector is compared with: its own trait's, or the only one."""
    trait = vectors.vectors[name].trait
    if trait in known.scores:
        return trait
    if len(known.scores) != 1:
        raise InputError(
            f"There is no score of {trait!r} to compare the vector {name!r} with, only of "
            f"{', '.join(known.scores)}: judge that trait (--trait), or omit the vector."
        )
    return next(iter(known.scores))


def _points(
    known: PromptScores, metric: str, layers: Sequence[int], values: np.ndarray
) -> Iterator[PromptPoint]:
    """Yield the prompts that have a score; ``values`` is ``[prompts, layers]``."""
    for row, (key, prompt) in enumerate(known.prompts.items()):
        if scores := known.scores[metric].get(key):
            yield PromptPoint(
                prompt=prompt.text,
                question=prompt.question,
                condition=known.conditions[key],
                answers=len(scores),
                score=float(np.mean(scores)),
                projections=dict(zip(layers, values[row].tolist(), strict=True)),
            )


def _column(
    vectors: LoadedVectors, name: str, layer: int, metric: str, points: Sequence[PromptPoint]
) -> MonitorColumn:
    x = [point.projections[layer] for point in points]
    y = [point.score for point in points]
    vector = vectors.vectors[name]
    known = vector.mean_norm is not None
    return MonitorColumn(
        vector=name,
        layer=layer,
        metric=metric,
        overall=correlation(x, y),
        within=within_group_correlation(x, y, [point.condition for point in points]),
        same_question=within_group_correlation(x, y, [point.question for point in points]),
        suggested=known and suggested_prompt_layer(vector, kind=vectors.kind) == layer,
    )
