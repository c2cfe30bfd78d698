"""``pvec steer-eval``: what steering with a vector does, and at what cost (paper, section 3).

Every condition answers the same evaluation questions with the same seeds on one engine: unsteered,
each layer and coefficient, a random vector of the same norm at the same points, and the trait asked
for in the system prompt. Without a vector this is the baseline evaluation of a model or adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pvec.backends.session import ModelSession, Notify, ignore, open_session
from pvec.errors import InputError, JudgeError
from pvec.evaluation.effect_numbers import SideEffects
from pvec.evaluation.search import Searched
from pvec.evaluation.setup import KIND, SteerSetup
from pvec.evaluation.side_effects import SideEffectSetup
from pvec.evaluation.summary import (
    KLLimit,
    ScoredAnswer,
    SweepSummary,
    keep_summary,
    read_sweep,
)
from pvec.evaluation.tasks import TaskScore, check_tasks, evaluate_tasks
from pvec.judges.plan import RunPlan, plan_run
from pvec.judges.scoring import JudgeReport, ResponseScorer, export_answers
from pvec.notebook import HtmlResult
from pvec.runs.names import slug
from pvec.runs.responses import ResponseRecord
from pvec.runs.store import Run
from pvec.settings import Settings
from pvec.types import Progress


@dataclass(frozen=True, kw_only=True)
class SteerEvalResult(HtmlResult):
    """What an evaluation made. ``numbers`` is None when nothing was judged (yet).

    ``answers`` counts those of this command's conditions, ``generated`` the new ones among them,
    ``cut`` those that reached the token limit.
    """

    trait: str
    run: Path
    model: str
    vectors: tuple[str, ...]
    conditions: int
    answers: int
    generated: int
    cut: int
    judge: JudgeReport | None = None
    numbers: SweepSummary | None = None
    searched: int = 0
    """Points that a search tried."""
    side_effects: SideEffects | None = None
    capability: tuple[TaskScore, ...] = ()
    next: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SteerEvalPlan(RunPlan):
    """What ``--dry-run`` tells of an evaluation."""

    trait: str
    conditions: tuple[str, ...]
    side_answers: int = 0
    """Answers to harmless and harmful questions that are still to be generated."""
    side_texts: int = 0
    """Benign texts that are read, each under every condition."""
    search_answers: int = 0
    """Answers that a search generates beside ``answers``, at most."""


def plan(
    settings: Settings,
    trait: str,
    *,
    vectors: Sequence[Path] = (),
    also: Sequence[str] = (),
    tasks: Sequence[str] = (),
    out: Path | None = None,
    lender: ModelSession | None = None,
    notify: Notify = ignore,
) -> SteerEvalPlan:
    """Say what ``run`` would do and what judging would cost; loads no weights, asks nobody."""
    check_tasks(tasks, settings)
    with open_session(settings, lender=lender) as session:
        setup = SteerSetup(session, trait, vectors=vectors, also=also, out=out)
        effects = _side_effects(setup)
        for note in setup.notes:
            notify(note)
        plan = plan_run(
            session,
            setup.folder,
            kind=KIND,
            identity=setup.identity,
            planned=setup.planned,
            metrics=setup.metrics,
            judged=settings.steer.judge,
            vectors=setup.loaded.values(),
        )
        return SteerEvalPlan(
            trait=setup.trait.name,
            conditions=tuple(condition.name for condition in setup.conditions),
            side_answers=effects.missing() if effects else 0,
            side_texts=len(effects.texts) if effects else 0,
            search_answers=setup.search_answers,
            **vars(plan),
        )


def run(  # noqa: PLR0913 (what to evaluate: each is an option)
    settings: Settings,
    trait: str,
    *,
    vectors: Sequence[Path] = (),
    also: Sequence[str] = (),
    tasks: Sequence[str] = (),
    out: Path | None = None,
    lender: ModelSession | None = None,
    notify: Notify = ignore,
    on_progress: Callable[[Progress], None] = ignore,
) -> SteerEvalResult:
    """Evaluate a model on ``trait`` (name or path), steered by ``vectors`` if there are any.

    ``also`` names further traits to judge, ``tasks`` lm-eval tasks to run unsteered and at the
    picked point. The run folder is ``out`` or ``runs/steer-TRAIT-MODEL``. The model is that of
    ``lender``, if there is one (see ``ModelSession.lend``). Raises ``InputError``,
    ``ModelError``, ``JudgeError`` or ``StoreError`` for wrong input before any weights are loaded,
    and ``JudgeError`` when the judge scored nothing.
    """
    check_tasks(tasks, settings)
    with ExitStack() as stack:
        session = stack.enter_context(
            open_session(settings, lender=lender, notify=notify, on_progress=on_progress)
        )
        setup = SteerSetup(session, trait, vectors=vectors, also=also, out=out)
        effects = _side_effects(setup)
        scorer = None
        if settings.steer.judge:
            scorer = stack.enter_context(ResponseScorer.of(session, vectors=setup.loaded.values()))
            scorer.check(setup.metrics)
        run = stack.enter_context(setup.open_run())
        run.store.update_manifest(relative_norms=setup.relative_norms)
        for note in setup.notes:
            notify(note)
        if effects is not None:
            stack.enter_context(effects.open())
        generated = 0
        if setup.steer.search and scorer is not None:
            limited = effects is not None and setup.steer.max_kl is not None
            mean_kl = effects.mean_kl if effects and limited else None
            generated = Searched(setup, run, scorer, mean_kl=mean_kl).run()
        generated += run.generate(setup.planned)
        records = run.responses(setup.planned)
        limit = effects.measure() if effects else None
        result = SteerEvalResult(
            trait=setup.trait.name,
            run=setup.folder,
            model=session.metadata.id,
            vectors=tuple(dict.fromkeys(c.vector for c in setup.conditions if c.role == "steered")),
            conditions=len(setup.every_condition),
            searched=len(setup.searched),
            answers=len(records),
            generated=generated,
            cut=sum(record.finish_reason == "length" for record in records),
            next=(f"pvec judge {setup.folder}",),
        )
        answers: Sequence[ScoredAnswer] = ()
        if scorer is not None:
            result, answers = _judged(result, setup, scorer, run.store, records, limit)
        if effects is not None:
            result = replace(result, side_effects=effects.keep(records, answers))
        if tasks:
            with run.store.stage("tasks"):
                scores = _capability(setup, tasks, result.numbers)
            run.store.update_manifest(capability=[asdict(score) for score in scores])
            result = replace(result, capability=scores)
        return result


def _side_effects(setup: SteerSetup) -> SideEffectSetup | None:
    """Return what is measured beside the trait, if the settings ask for it."""
    if setup.steer.side_effects or setup.steer.max_kl is not None:
        return SideEffectSetup(setup)
    if setup.steer.benign is not None:
        raise InputError("--benign has no effect without --side-effects or --max-kl: add one.")
    return None


def _judged(
    result: SteerEvalResult,
    setup: SteerSetup,
    scorer: ResponseScorer,
    store: Run,
    records: Sequence[ResponseRecord],
    limit: KLLimit | None,
) -> tuple[SteerEvalResult, list[ScoredAnswer]]:
    """Score the answers, export them, and summarise all that the run holds."""
    with store.stage("judge"):
        report = scorer.score(store, records, setup.metrics, on_progress=setup.session.on_progress)
    answers = read_sweep(store, judge=report.judge)
    if not any(score is not None for answer in answers for score in answer.scores.values()):
        raise JudgeError(
            f"The judge {report.judge} scored none of {len(answers)} answers; they are kept in "
            f"{store.path}: try another judge with `pvec judge {store.path}`."
        )
    trait, scores = setup.trait.name, store.scores_by_response(judge=report.judge)
    for condition in setup.every_condition:
        own = [record for record in records if record.condition["name"] == condition.name]
        name = f"answers/{trait}_{slug(condition.name)}"
        export_answers(store, name, own, trait=trait, scores=scores)
    numbers = keep_summary(
        store,
        answers,
        trait=trait,
        min_coherence=setup.steer.min_coherence,
        kl=limit,
    )
    result = replace(result, judge=report, numbers=numbers, next=(f"pvec report {store.path}",))
    return result, answers


def _capability(
    setup: SteerSetup, tasks: Sequence[str], numbers: SweepSummary | None
) -> tuple[TaskScore, ...]:
    """Run the tasks unsteered and at each picked point (the first, when nothing is judged)."""
    picked = {pick.point.name for pick in numbers.picks} if numbers else set()
    steered = [c for c in setup.conditions if c.role == "steered"]
    chosen = [c for c in steered if c.name in picked] or steered[:1]
    baseline = [c for c in setup.conditions if c.role == "baseline"]
    return evaluate_tasks(
        setup.session.backend,
        tasks,
        {condition.name: condition.steering for condition in (*baseline, *chosen)},
        on_progress=setup.session.on_progress,
    )
