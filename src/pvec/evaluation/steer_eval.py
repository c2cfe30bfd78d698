"""``pvec steer-eval``: what steering with a vector does, and at what cost (paper, section 3).

Every condition answers the same evaluation questions with the same seeds on one engine: unsteered,
each layer and coefficient, a random vector of the same norm at the same points, and the trait asked
for in the system prompt. Without a vector this is the baseline evaluation of a model or adapter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pvec.backends.planned import generate_missing, missing
from pvec.backends.run_session import manifest_sections
from pvec.backends.session import ModelSession, Notify, ignore
from pvec.data.judged_csv import JudgedAnswer, write_judged_csv
from pvec.errors import JudgeError
from pvec.evaluation.setup import SteerSetup, open_run
from pvec.evaluation.summary import SweepNumbers, read_sweep, summarise
from pvec.evaluation.tasks import TaskScore, check_tasks, evaluate_tasks
from pvec.judges.prompts import COHERENCE
from pvec.judges.scoring import JudgeReport, ResponseScorer, estimate_scoring, score_of
from pvec.runs.names import slug
from pvec.runs.responses import ResponseRecord
from pvec.runs.store import Run
from pvec.settings import Settings
from pvec.types import Progress


@dataclass(frozen=True, kw_only=True)
class SteerEvalResult:
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
    numbers: SweepNumbers | None = None
    capability: tuple[TaskScore, ...] = ()
    next: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SteerEvalPlan:
    """What ``--dry-run`` tells before anything is spent. ``most_tokens`` are generated if every
    missing answer runs to its limit.
    """

    trait: str
    run: Path
    conditions: tuple[str, ...]
    answers: int
    missing: int
    most_tokens: int
    judge: str
    judging: str


def plan(
    settings: Settings,
    trait: str,
    *,
    vectors: Sequence[Path] = (),
    also: Sequence[str] = (),
    out: Path | None = None,
) -> SteerEvalPlan:
    """Say what ``run`` would do and what judging would cost; loads no weights, asks nobody."""
    with ModelSession(settings) as session:
        setup = SteerSetup(settings, trait, session, vectors=vectors, also=also, out=out)
        scorer = ResponseScorer(settings, session=session, bundled=session.metadata.bundled)
        begun = (setup.folder / "manifest.json").exists()
        todo = missing(Run.read(setup.folder), setup.wanted) if begun else setup.wanted
        judging = estimate_scoring(
            [one.question for one in setup.wanted],
            setup.metrics,
            answer_tokens=session.max_tokens,
            price=scorer.choice.price,
        )
        return SteerEvalPlan(
            trait=setup.trait.name,
            run=setup.folder,
            conditions=tuple(condition.name for condition in setup.conditions),
            answers=len(setup.wanted),
            missing=len(todo),
            most_tokens=sum(one.sampling.max_tokens for one in todo),
            judge=scorer.choice.model,
            judging=str(judging),
        )


def run(
    settings: Settings,
    trait: str,
    *,
    vectors: Sequence[Path] = (),
    also: Sequence[str] = (),
    tasks: Sequence[str] = (),
    out: Path | None = None,
    notify: Notify = ignore,
    on_progress: Callable[[Progress], None] = ignore,
) -> SteerEvalResult:
    """Evaluate a model on ``trait`` (name or path), steered by ``vectors`` if there are any.

    ``also`` names further traits to judge, ``tasks`` lm-eval tasks to run unsteered and at the
    picked point. The run folder is ``out`` or ``runs/steer-TRAIT-MODEL``. Raises ``InputError``,
    ``ModelError``, ``JudgeError`` or ``StoreError`` for wrong input before any weights are loaded,
    and ``JudgeError`` when the judge scored nothing.
    """
    check_tasks(tasks)
    with ExitStack() as stack:
        session = stack.enter_context(
            ModelSession(settings, notify=notify, on_progress=on_progress)
        )
        setup = SteerSetup(settings, trait, session, vectors=vectors, also=also, out=out)
        scorer = None
        if settings.steer.judge:
            scorer = ResponseScorer(
                settings, session=session, bundled=session.metadata.bundled, notify=notify
            )
            stack.enter_context(scorer)
        store = stack.enter_context(open_run(setup))
        if scorer is not None:
            scorer.check()
        for note in (*setup.trait.notes, *store.notes, *setup.notes):
            notify(note)
        job = _Job(setup, store, scorer, tasks=tasks, on_progress=on_progress)
        return job.run()


class _Job:
    """One evaluation on its way through the steps."""

    def __init__(
        self,
        setup: SteerSetup,
        store: Run,
        scorer: ResponseScorer | None,
        *,
        tasks: Sequence[str],
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.setup = setup
        self.store = store
        self.scorer = scorer
        self.tasks = tasks
        self.on_progress = on_progress
        self.timings: dict[str, float] = {}
        store.begin_session(**manifest_sections(setup.session))
        store.keep_traits([setup.trait, *setup.also])

    def run(self) -> SteerEvalResult:
        setup = self.setup
        with self._timed("generate"):
            generated = generate_missing(
                self.store, setup.session, setup.wanted, on_progress=self.on_progress
            )
        records = self._records()
        result = SteerEvalResult(
            trait=setup.trait.name,
            run=self.store.path,
            model=setup.session.metadata.id,
            vectors=tuple(dict.fromkeys(c.vector for c in setup.conditions if c.role == "steered")),
            conditions=len(setup.conditions),
            answers=len(records),
            generated=generated,
            cut=sum(record.finish_reason == "length" for record in records),
            next=(f"pvec judge {self.store.path}",),
        )
        if self.scorer is not None:
            result = self._judged(self.scorer, result, records)
        if self.tasks:
            with self._timed("tasks"):
                result = replace(result, capability=self._capability(result))
        self.store.end_session(timings=self.timings)
        return result

    def _judged(
        self, scorer: ResponseScorer, result: SteerEvalResult, records: list[ResponseRecord]
    ) -> SteerEvalResult:
        with self._timed("judge"):
            report = scorer.score(
                self.store, records, self.setup.metrics, on_progress=self.on_progress
            )
        ids = {record.id for record in records}
        answers = read_sweep(self.store, judge=report.judge, wanted=ids.__contains__)
        if not any(score is not None for one in answers for score in one.scores.values()):
            raise JudgeError(
                f"The judge {report.judge} scored none of {len(answers)} answers; they are kept in "
                f"{self.store.path}: try another judge with `pvec judge {self.store.path}`."
            )
        self._export(records, report.judge)
        numbers = summarise(
            answers,
            trait=self.setup.trait.name,
            min_coherence=self.setup.settings.steer.min_coherence,
        )
        following = (f"pvec report {self.store.path}",)
        return replace(result, judge=report, numbers=numbers, next=following)

    def _export(self, records: Sequence[ResponseRecord], judge: str) -> None:
        """Write one CSV per condition, in the reference's columns."""
        trait = self.setup.trait.name
        scores = self.store.scores_by_response(judge=judge)
        for condition in self.setup.conditions:
            name = f"{trait}_{slug(condition.name)}"
            rows = [
                JudgedAnswer(
                    question=record.question,
                    prompt=record.prompt,
                    answer=record.answer,
                    question_id=record.question_id,
                    trait_score=score_of(scores.get(record.id, {}), trait),
                    coherence=score_of(scores.get(record.id, {}), COHERENCE),
                )
                for record in records
                if record.condition["name"] == condition.name
            ]
            write_judged_csv(self.store.csv_path(f"answers/{name}"), rows, trait=trait)

    def _capability(self, result: SteerEvalResult) -> tuple[TaskScore, ...]:
        """Run the tasks unsteered and at each picked point (the first, when nothing is judged)."""
        steered = [c for c in self.setup.conditions if c.role == "steered"]
        picked = {pick.point.name for pick in result.numbers.picks} if result.numbers else set()
        chosen = [c for c in steered if c.name in picked] or steered[:1]
        baseline = [c for c in self.setup.conditions if c.role == "baseline"]
        scores = evaluate_tasks(
            self.setup.session.backend,
            self.tasks,
            {condition.name: condition.steering for condition in (*baseline, *chosen)},
            on_progress=self.on_progress,
        )
        self.store.update_manifest(capability=[score.describe() for score in scores])
        return scores

    def _records(self) -> list[ResponseRecord]:
        order = {one.id: position for position, one in enumerate(self.setup.wanted)}
        found = [record for record in self.store.responses() if record.id in order]
        return sorted(found, key=lambda record: order[record.id])

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.timings[stage] = round(time.perf_counter() - started, 3)
