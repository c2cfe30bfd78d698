"""``pvec extract``: from a trait to its persona vector (paper, section 2 and appendix A).

Generate answers under opposite system prompts, judge them, keep those that show the trait (or do
not), average their activations, take the difference. Every step appends to the run folder as it
goes, so a second call finishes what is missing and repeats nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from pvec.backends.kept_means import KeptMeans
from pvec.backends.planned import (
    PlannedResponse,
    PromptCache,
    derive_seed,
    question_messages,
)
from pvec.backends.run_session import RunSession, run_identity, use_run_date
from pvec.backends.session import ModelSession, Notify, ignore, open_session
from pvec.errors import InputError
from pvec.extraction.vector import (
    ENOUGH,
    RunVector,
    activations_note,
    activations_of,
    vector_of_run,
)
from pvec.judges.plan import RunPlan, plan_run
from pvec.judges.prompts import metrics_of
from pvec.judges.scoring import JudgeReport, ResponseScorer
from pvec.notebook import HtmlResult
from pvec.runs.names import run_name
from pvec.runs.responses import Json
from pvec.settings import Settings
from pvec.settings.commands import ExtractSettings
from pvec.traits.check import require_usable
from pvec.traits.trait import Trait, load_trait, name_or_path
from pvec.types import SIGNS, Progress, Sign

KIND = "extract"


@dataclass(frozen=True, kw_only=True)
class ExtractResult(HtmlResult):
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
class ExtractPlan(RunPlan):
    """What ``--dry-run`` tells of one trait."""

    trait: str


def plan(
    settings: Settings,
    traits: Sequence[str],
    *,
    out: Path | None = None,
    lender: ModelSession | None = None,
    notify: Notify = ignore,
) -> list[ExtractPlan]:
    """Say what ``run`` would do and what judging would cost; loads no weights, asks nobody.

    Raises what ``run`` raises for bad input.
    """
    with open_session(settings, lender=lender) as session:
        plans = []
        for trait in load_traits(traits, settings.extract, out=out, notify=notify):
            folder = run_folder(settings, trait, out=out)
            use_run_date(session, folder)
            plan = plan_run(
                session,
                folder,
                kind=KIND,
                identity=_identity(trait, session),
                planned=planned_responses(trait, session),
                metrics=metrics_of(trait),
                judged=settings.extract.judge,
                captures=settings.extract.judge,
            )
            _note_activations(session, plan.answers, folder, notify=notify)
            plans.append(ExtractPlan(trait=trait.name, **vars(plan)))
        return plans


def run(
    settings: Settings,
    traits: Sequence[str],
    *,
    out: Path | None = None,
    lender: ModelSession | None = None,
    notify: Notify = ignore,
    on_progress: Callable[[Progress], None] = ignore,
) -> list[ExtractResult]:
    """Extract the persona vectors of ``traits`` (names or paths) with one model load.

    Each trait gets a run folder: ``out`` for a single one, else ``runs/TRAIT-MODEL``. The model is
    that of ``lender``, if there is one (see ``ModelSession.lend``). Raises
    ``InputError``, ``ModelError``, ``JudgeError`` or ``StoreError`` for wrong input before any
    weights are loaded, and ``InputError`` with the counts when too few answers were kept (after
    the other traits were finished).
    """
    loaded = load_traits(traits, settings.extract, out=out, notify=notify)
    with ExitStack() as stack:
        session = stack.enter_context(
            open_session(settings, lender=lender, notify=notify, on_progress=on_progress)
        )
        scorer = None
        if settings.extract.judge:
            scorer = stack.enter_context(ResponseScorer.of(session))
            session.kept_means = stack.enter_context(KeptMeans())
            scorer.check(metrics_of(*loaded), extraction=True)
        jobs = []
        for trait in loaded:
            folder, identity = run_folder(settings, trait, out=out), _identity(trait, session)
            run = RunSession(session, folder, kind=KIND, identity=identity, traits=[trait])
            jobs.append(_Job(stack.enter_context(run), trait, scorer))
        for job in jobs:
            job.generate()
        return _finish(jobs)


def planned_responses(trait: Trait, session: ModelSession) -> list[PlannedResponse]:
    """Return the answers of an extraction: instruction x question x rollout, both signs.

    A positive answer and its opposite number share their seed.
    """
    prompts, extract = PromptCache(session), session.settings.extract
    return [
        _planned(trait, session, prompts, sign=sign, instruction=i, question=q, rollout=r)
        for q in range(len(trait.questions("extract")[: extract.limit]))
        for i in range(len(trait.instructions))
        for sign in SIGNS
        for r in range(extract.rollouts)
    ]


def run_folder(settings: Settings, trait: Trait, *, out: Path | None = None) -> Path:
    """Return the run folder of a trait: ``out``, or ``runs/TRAIT-MODEL``."""
    if out is not None:
        return out
    model = settings.model
    return settings.paths.runs / run_name(trait.name, model=model.id, adapter=model.adapter)


class _Job:
    """One trait on its way through the steps."""

    def __init__(self, run: RunSession, trait: Trait, scorer: ResponseScorer | None) -> None:
        self.run = run
        self.trait = trait
        self.scorer = scorer
        self.planned = planned_responses(trait, run.session)
        self.generated = 0
        session = run.session
        _note_activations(session, len(self.planned), run.store.path, notify=session.notify)

    def generate(self) -> None:
        """Generate the answers that are missing."""
        self.generated = self.run.generate(self.planned, stage=f"{self.trait.name}: answers")

    def finish(self) -> ExtractResult:
        """Judge, filter and average; write the vector and the exports."""
        run = self.run
        records = run.responses(self.planned)
        result = ExtractResult(
            trait=self.trait.name,
            run=run.store.path,
            model=run.session.metadata.id,
            answers=len(records),
            generated=self.generated,
            cut=sum(record.finish_reason == "length" for record in records),
            next=(f"pvec judge {run.store.path}",),
        )
        if self.scorer is None:
            return result
        with run.store.stage("judge"):
            report = self.scorer.score(
                run.store,
                records,
                metrics_of(self.trait),
                on_progress=run.session.on_progress,
            )
        with run.store.stage("vector"):
            vector = vector_of_run(
                run.store,
                self.trait,
                records,
                judge=report.judge,
                session=run.session,
                keep_activations=run.session.settings.extract.keep_activations,
            )
        return replace(result, judge=report, vector=vector, next=self._next(vector))

    def _next(self, vector: RunVector) -> tuple[str, ...]:
        model = self.run.settings.model
        options = "" if model.id == "tiny" else f" --model {model.id}"
        options += f" --adapter {model.adapter}" if model.adapter else ""
        trait = name_or_path(self.trait)
        return (
            f"pvec vector show {vector.path}",
            f"pvec steer-eval --trait {trait} --vector {vector.path} "
            f"--layer {vector.summary.suggested_layer}{options}",
        )


def _note_activations(session: ModelSession, answers: int, folder: Path, *, notify: Notify) -> None:
    if session.settings.extract.keep_activations:
        size = activations_note(session.metadata, answers, folder=activations_of(folder))
        notify(f"if all answers count, {size}")


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
        done = "".join(f" The vector of {r.trait!r} is in {r.run}." for r in results)
        raise InputError(" ".join(map(str, failures)) + done)
    return results


def load_traits(
    names: Sequence[str], settings: ExtractSettings, *, out: Path | None, notify: Notify = ignore
) -> list[Trait]:
    """Return the traits; refuse what could never make a vector, before anybody is asked."""
    if settings.keep_activations and not settings.judge:
        raise InputError(
            "--keep-activations keeps those of the answers that count, which judging decides: omit "
            "it here and give it to `pvec vector compute`."
        )
    if not names:
        raise InputError("No trait was named: give --trait NAME (`pvec trait list` shows them).")
    if out is not None and len(names) > 1:
        raise InputError("--out takes one trait: omit it, and each trait gets a folder in runs/.")
    traits = [load_trait(name) for name in names]
    repeated = [name for name, count in Counter(t.name for t in traits).items() if count > 1]
    if repeated:
        raise InputError(f"The trait {repeated[0]!r} was named twice: name each trait once.")
    for trait in traits:
        for note in require_usable(trait, uses="extract"):
            notify(note)
        questions = len(trait.questions("extract")[: settings.limit])
        count = questions * len(trait.instructions) * settings.rollouts
        if settings.judge and count < ENOUGH:
            raise InputError(
                f"{count} answers of each sign to {trait.name!r} can never make a vector, which "
                f"needs {ENOUGH} that count: ask for more with --rollouts or --limit, or omit "
                f"judging (--no-judge)."
            )
    return traits


def _identity(trait: Trait, session: ModelSession) -> dict[str, Json]:
    return run_identity(session, subject={"trait": trait.name, "trait_hash": trait.hash})


def _planned(
    trait: Trait,
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
    seed = derive_seed(session.settings.generation.seed, trait.name, question, instruction, rollout)
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
