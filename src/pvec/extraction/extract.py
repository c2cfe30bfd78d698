"""``pvec extract``: from a trait to its persona vector (paper, section 2 and appendix A).

Generate answers under opposite system prompts, judge them, keep those that show the trait (or do
not), average their activations, take the difference. Every step appends to the run folder as it
goes, so a second call finishes what is missing and repeats nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pvec.backends.identity import keep_settings, run_identity
from pvec.backends.kept_means import KeptMeans
from pvec.backends.planned import (
    PlannedResponse,
    PromptCache,
    derive_seed,
    generate_missing,
    missing,
    question_messages,
)
from pvec.backends.session import ModelSession, Notify, ignore
from pvec.errors import InputError
from pvec.extraction.vectors import RunVector, vector_of_run
from pvec.judges.judging import estimate_judging
from pvec.judges.scoring import JudgeReport, ResponseScorer, keep_traits, trait_metrics
from pvec.runs.names import run_name
from pvec.runs.responses import ResponseRecord
from pvec.runs.store import Run
from pvec.settings import Settings
from pvec.traits.check import require_usable
from pvec.traits.trait import Trait, load_trait, name_or_path
from pvec.types import Progress
from pvec.vectors.filter import Sign

KIND = "extract"
SIGNS: tuple[Sign, ...] = ("pos", "neg")


@dataclass(frozen=True, kw_only=True)
class ExtractResult:
    """What one trait's extraction made. ``vector`` is None when nothing was judged (yet)."""

    trait: str
    run: Path
    model: str
    answers: int
    generated: int
    cut: int
    """Answers that reached the token limit."""
    judge: JudgeReport | None = None
    vector: RunVector | None = None
    next: tuple[str, ...] = ()
    """Commands to type next."""


@dataclass(frozen=True, kw_only=True)
class ExtractPlan:
    """What ``--dry-run`` tells before anything is spent, for one trait. ``most_tokens`` are
    generated if every missing answer runs to its limit.
    """

    trait: str
    run: Path
    answers: int
    missing: int
    most_tokens: int
    judge: str
    judging: str


def plan(
    settings: Settings, traits: Sequence[str], *, out: Path | None = None
) -> list[ExtractPlan]:
    """Say what ``run`` would do and what judging would cost; loads no weights, asks nobody.

    Raises what ``run`` raises for bad input.
    """
    with ModelSession(settings) as session:
        scorer = ResponseScorer(settings, session=session, bundled=session.metadata.bundled)
        return [
            _plan_one(settings, trait, session, scorer, folder=run_folder(settings, trait, out=out))
            for trait in _load_traits(traits, out=out)
        ]


def run(
    settings: Settings,
    traits: Sequence[str],
    *,
    out: Path | None = None,
    notify: Notify = ignore,
    on_progress: Callable[[Progress], None] = ignore,
) -> list[ExtractResult]:
    """Extract the persona vectors of ``traits`` (names or paths) with one model load.

    Each trait gets a run folder: ``out`` for a single one, else ``runs/TRAIT-MODEL``. Raises
    ``InputError``, ``ModelError``, ``JudgeError`` or ``StoreError`` for wrong input before any
    weights are loaded, and ``InputError`` with the counts when too few answers were kept (after
    the other traits were finished).
    """
    loaded = _load_traits(traits, out=out)
    with ExitStack() as stack:
        session = stack.enter_context(
            ModelSession(settings, notify=notify, on_progress=on_progress)
        )
        scorer = None
        if settings.extract.judge:
            scorer = ResponseScorer(
                settings, session=session, bundled=session.metadata.bundled, notify=notify
            )
            stack.enter_context(scorer)
            session.kept_means = stack.enter_context(KeptMeans())
        stores = [
            stack.enter_context(_open_run(settings, trait, session, out=out)) for trait in loaded
        ]
        if scorer is not None:
            scorer.check()
        jobs = [
            _Job(settings, trait, store, session, scorer, notify, on_progress)
            for trait, store in zip(loaded, stores, strict=True)
        ]
        for job in jobs:
            job.generate()
        return _finish(jobs)


def wanted_answers(
    trait: Trait, settings: Settings, session: ModelSession
) -> list[PlannedResponse]:
    """Return the answers that an extraction wants: instruction x question x rollout, both signs.

    A positive answer and its opposite number share their seed.
    """
    prompts = PromptCache(session)
    return [
        _wanted(trait, settings, session, prompts, sign=sign, instruction=i, question=q, rollout=r)
        for q in range(len(trait.questions("extract")[: settings.extract.limit]))
        for i in range(len(trait.instructions))
        for sign in SIGNS
        for r in range(settings.extract.rollouts)
    ]


def run_folder(settings: Settings, trait: Trait, *, out: Path | None = None) -> Path:
    """Return the run folder of a trait: ``out``, or ``runs/TRAIT-MODEL``."""
    if out is not None:
        return out
    model = settings.model
    return settings.paths.runs / run_name(trait.name, model=model.id, adapter=model.adapter)


class _Job:
    """One trait on its way through the steps."""

    def __init__(
        self,
        settings: Settings,
        trait: Trait,
        store: Run,
        session: ModelSession,
        scorer: ResponseScorer | None,
        notify: Notify,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.settings = settings
        self.trait = trait
        self.store = store
        self.session = session
        self.scorer = scorer
        self.on_progress = on_progress
        self.wanted = wanted_answers(trait, settings, session)
        self.generated = 0
        self.timings: dict[str, float] = {}
        store.begin_session(command=sys.argv)
        keep_traits(store, [trait])
        keep_settings(store, settings, session)
        for note in (*trait.notes, *store.notes):
            notify(note)

    def generate(self) -> None:
        """Generate the answers that are missing."""
        with self._timed("generate"):
            self.generated = generate_missing(
                self.store,
                self.session,
                self.wanted,
                on_progress=self.on_progress,
                stage=f"{self.trait.name}: answers",
            )

    def finish(self) -> ExtractResult:
        """Judge, filter and average; write the vector and the exports."""
        records = self._records()
        result = ExtractResult(
            trait=self.trait.name,
            run=self.store.path,
            model=self.session.metadata.id,
            answers=len(records),
            generated=self.generated,
            cut=sum(record.finish_reason == "length" for record in records),
        )
        if self.scorer is None:
            result = replace(result, next=(f"pvec judge {self.store.path}",))
        else:
            result = self._judged(self.scorer, result, records)
        self.store.end_session(timings=self.timings)
        return result

    def _judged(
        self, scorer: ResponseScorer, result: ExtractResult, records: list[ResponseRecord]
    ) -> ExtractResult:
        with self._timed("judge"):
            report = scorer.score(
                self.store, records, trait_metrics(self.trait), on_progress=self.on_progress
            )
        with self._timed("vector"):
            vector = vector_of_run(
                self.store,
                self.trait,
                records,
                judge=report.judge,
                session=self.session,
                settings=self.settings,
                on_progress=self.on_progress,
            )
        return replace(result, judge=report, vector=vector, next=self._next(vector))

    def _next(self, vector: RunVector) -> tuple[str, ...]:
        model = self.settings.model
        options = "" if model.id == "tiny" else f" --model {model.id}"
        options += f" --adapter {model.adapter}" if model.adapter else ""
        trait = name_or_path(self.trait)
        return (
            f"pvec vector show {vector.path}",
            f"pvec steer-eval --trait {trait} --vector {vector.path} "
            f"--layer {vector.summary.suggested_layer}{options}",
        )

    def _records(self) -> list[ResponseRecord]:
        order = {one.id: position for position, one in enumerate(self.wanted)}
        found = [record for record in self.store.responses() if record.id in order]
        return sorted(found, key=lambda record: order[record.id])

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.timings[stage] = round(time.perf_counter() - started, 3)


def _finish(jobs: Sequence[_Job]) -> list[ExtractResult]:
    """Judge and average trait by trait; one trait's failure does not take the others' vectors."""
    results: list[ExtractResult] = []
    failures: list[InputError] = []
    for job in jobs:
        try:
            results.append(job.finish())
        except InputError as error:
            failures.append(error)
    if failures:
        done = "".join(f" The vector of {one.trait!r} is in {one.run}." for one in results)
        raise InputError(" ".join(map(str, failures)) + done)
    return results


def _load_traits(names: Sequence[str], *, out: Path | None) -> list[Trait]:
    if not names:
        raise InputError("No trait was named: give --trait NAME (`pvec trait list` shows them).")
    if out is not None and len(names) > 1:
        raise InputError("--out takes one trait: leave it away, and each gets a folder in runs/.")
    traits = [load_trait(name) for name in names]
    twice = {one.name for one in traits if sum(one.name == other.name for other in traits) > 1}
    if twice:
        raise InputError(f"The trait {min(twice)!r} was named twice: name each trait once.")
    for trait in traits:
        require_usable(trait)
        trait.questions("extract")
    return traits


def _open_run(settings: Settings, trait: Trait, session: ModelSession, *, out: Path | None) -> Run:
    subject = {"trait": trait.name, "trait_hash": trait.hash}
    return Run.open_or_create(
        run_folder(settings, trait, out=out),
        kind=KIND,
        identity=run_identity(settings, session, subject=subject),
    )


def _wanted(
    trait: Trait,
    settings: Settings,
    session: ModelSession,
    prompts: PromptCache,
    *,
    sign: Sign,
    instruction: int,
    question: int,
    rollout: int,
) -> PlannedResponse:
    system = trait.system_prompt(sign, instruction)
    text = trait.extract_questions[question]
    prompt, prompt_ids = prompts(question_messages(text, system=system))
    seed = derive_seed(settings.generation.seed, trait.name, question, instruction, rollout)
    return PlannedResponse(
        trait=trait.name,
        condition={"sign": sign, "instruction": instruction, "rollout": rollout},
        question=text,
        question_id=f"{trait.name}_extract_{question}",
        system=system,
        prompt=prompt,
        prompt_ids=prompt_ids,
        sampling=session.sampling(seed),
        engine=session.identity,
    )


def _plan_one(
    settings: Settings, trait: Trait, session: ModelSession, scorer: ResponseScorer, *, folder: Path
) -> ExtractPlan:
    wanted = wanted_answers(trait, settings, session)
    todo = missing(Run.read(folder), wanted) if (folder / "manifest.json").exists() else wanted
    judging = estimate_judging(
        [one.question for one in wanted],
        trait_metrics(trait),
        answers_per_question=1,
        answer_tokens=session.max_tokens,
        price=scorer.choice.price,
    )
    return ExtractPlan(
        trait=trait.name,
        run=folder,
        answers=len(wanted),
        missing=len(todo),
        most_tokens=sum(one.sampling.max_tokens for one in todo),
        judge=scorer.choice.model,
        judging=str(judging),
    )
