"""``pvec vector compute``: a persona vector from a run, or from judged answers in CSV files.

Under a launcher (``accelerate launch``) every process captures its share of the answers; the main
one writes and returns the result, the others return None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pvec.activations.answers import KeptAnswer
from pvec.backends.processes import Processes
from pvec.backends.session import ModelSession, Notify, ignore
from pvec.data.judged_csv import JudgedAnswer, read_judged_csv
from pvec.errors import InputError, ModelError, StoreError
from pvec.extraction.vector import (
    Contribution,
    compute_vector,
    contribution_of,
    filter_provenance,
    method_path,
    vector_of_run,
)
from pvec.models.chat import encode_pair, spans_from_ids, think_length
from pvec.notebook import HtmlResult
from pvec.runs.names import run_name
from pvec.runs.store import Run
from pvec.settings import Settings
from pvec.types import MEAN_DIFF, Method, Progress, Sign
from pvec.vectors.estimators import require_methods
from pvec.vectors.files import output_path, save_vector
from pvec.vectors.filter import FilterResult, Reason, ScoredResponse, filter_responses
from pvec.vectors.quality import VectorSummary, summarize


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """How much of the answers is thinking: ``answers`` of ``of`` think, with ``tokens`` that are
    ``share`` of all the answers' tokens; ``averaged`` says whether they count towards the vector.
    """

    answers: int
    of: int
    tokens: int
    share: float
    averaged: bool


@dataclass(frozen=True, kw_only=True)
class ComputeResult(HtmlResult):
    """A vector that was computed, and from what.

    ``empty`` answers were kept and have no token to average. ``merged`` ones share a token with
    their prompt's end, which counts as theirs.
    """

    trait: str
    model: str
    path: Path
    filtered: Mapping[Sign, Mapping[Reason, int]]
    thinking: Thinking
    summary: VectorSummary
    empty: int
    merged: int = 0
    next: tuple[str, ...] = ()


def from_run(
    settings: Settings,
    path: Path,
    *,
    judge: str | None = None,
    out: Path | None = None,
    method: Method = MEAN_DIFF,
    notify: Notify = ignore,
    on_progress: Callable[[Progress], None] = ignore,
) -> ComputeResult | None:
    """Compute the vector of an extraction that was judged, with the model that gave its answers.

    ``judge`` says whose scores count when several judges scored it. The vector goes into the run
    (that of another ``method`` into ``vectors/METHOD``), or to ``out``. Raises ``StoreError`` for a
    folder that is no extraction, ``ModelError`` when the model of the settings is another one, and
    ``InputError`` when too few answers count.
    """
    require_methods([method])
    extraction = Run.read(path)
    if extraction.kind != "extract":
        raise StoreError(
            f"{path} is a run of {extraction.kind!r}: vectors are made from the runs of "
            f"`pvec extract`."
        )
    chosen = extraction.choose_judge(judge)
    if chosen is None:
        raise InputError(f"{path} has no scores yet: score it with `pvec judge {path}`.")
    (trait,) = extraction.traits()
    with (
        _session(settings, notify=notify, on_progress=on_progress) as session,
        ExitStack() as stack,
    ):
        _require_same_model(extraction, session)
        if out is not None:
            out = vector_output(out, trait=trait.name, notify=session.notify)
        store = extraction
        if session.processes.main:
            store = stack.enter_context(Run.reopen(path))
            stack.enter_context(store.session())
        # answers to one prompt side by side, so that one process computes it once for all of them
        records = sorted(store.responses(), key=lambda record: (record.prompt_ids, record.id))
        vector = vector_of_run(
            store,
            trait,
            records,
            judge=chosen,
            session=session,
            out=out,
            method=method,
            keep_activations=settings.extract.keep_activations,
        )
        return _result(
            trait.name,
            vector.path,
            session,
            filtered=vector.filtered,
            summary=vector.summary,
            responses=[contribution_of(record) for record in records],
            averaged=False,
        )


def from_csv(
    settings: Settings,
    pos: Path,
    neg: Path,
    *,
    trait: str,
    out: Path | None = None,
    method: Method = MEAN_DIFF,
    notify: Notify = ignore,
    on_progress: Callable[[Progress], None] = ignore,
) -> ComputeResult | None:
    """Compute a vector from two CSV files of judged answers in the reference's columns.

    ``trait`` names the column of its score; ``prompt`` is the rendered chat template. The vector
    goes to ``out``, by default ``vectors/TRAIT-MODEL.safetensors`` (``vectors/METHOD/…``), and
    activations that are kept into a folder beside it, ``TRAIT-MODEL-activations``. Raises
    ``InputError`` for missing files, columns and scores that are no numbers, and when too few
    answers count.
    """
    require_methods([method])
    paths: dict[Sign, Path] = {"pos": pos, "neg": neg}
    answers = {sign: list(read_judged_csv(path, trait=trait)) for sign, path in paths.items()}
    filtered = _filter_rows(answers, paths=paths, settings=settings)
    name = run_name(trait, model=settings.model.id, adapter=settings.model.adapter)
    target = vector_output(
        out or method_path(Path("vectors") / f"{name}.safetensors", method),
        trait=trait,
        notify=notify,
    )
    keep = target.with_name(f"{target.stem}-activations")
    with _session(settings, notify=notify, on_progress=on_progress) as session:
        tokenised = _tokenised(answers, session)
        kept = [response for response in tokenised if filtered.kept(response.answer.id)]
        provenance = {
            **filter_provenance(settings.filter, filtered),
            "source": f"{pos.name}, {neg.name}",
        }
        vector = compute_vector(
            session,
            trait,
            kept,
            filtered=filtered,
            provenance=provenance,
            method=method,
            keep=keep if settings.extract.keep_activations else None,
        )
        session.processes.on_main(lambda: save_vector(vector, target))
        return _result(
            trait,
            target,
            session,
            filtered=filtered.counts,
            summary=summarize(vector),
            responses=kept,
            averaged=session.thinking,
        )


def vector_output(out: Path, *, trait: str, notify: Notify = ignore) -> Path:
    """Return the file that a vector goes to (``output_path``), and say what its format leaves out.

    Called before anything is captured. Raises as ``output_path`` does.
    """
    path = output_path(out, trait=trait)
    if path.suffix != ".safetensors":
        notify(
            f"{path.name} will hold one kind of vector alone, without residual norms, quality and "
            f"provenance: a .safetensors file holds all of it"
        )
    return path


def with_model_of(settings: Settings, path: Path) -> Settings:
    """Return ``settings`` with the model and adapter that gave the answers of a run."""
    recorded = Run.read(path).manifest.get("model", {})
    if recorded.get("id") is None:
        return settings
    model = {"id": recorded["id"], "adapter": recorded.get("adapter")}
    return settings.model_copy(update={"model": settings.model.model_copy(update=model)})


@contextmanager
def _session(
    settings: Settings, *, notify: Notify, on_progress: Callable[[Progress], None]
) -> Iterator[ModelSession]:
    """Open the model of this process; only the main one of a launch says anything."""
    with Processes.launched() as processes:
        if not processes.main:
            notify = on_progress = ignore
        with ModelSession(
            settings, notify=notify, on_progress=on_progress, processes=processes
        ) as session:
            yield session


def _require_same_model(run: Run, session: ModelSession) -> None:
    recorded = run.manifest.get("model", {})
    fingerprint = recorded.get("fingerprint")
    if fingerprint and fingerprint != session.metadata.fingerprint:
        adapter = f" with the adapter {recorded['adapter']}" if recorded.get("adapter") else ""
        raise ModelError(
            f"The answers of {run.path} are by {recorded.get('id')}{adapter} (fingerprint "
            f"{fingerprint}), not by {session.metadata.id} ({session.metadata.fingerprint}): give "
            f"that model with --model and --adapter."
        )


def _result(
    trait: str,
    path: Path,
    session: ModelSession,
    *,
    filtered: Mapping[Sign, Mapping[Reason, int]],
    summary: VectorSummary,
    responses: Sequence[Contribution],
    averaged: bool,
) -> ComputeResult | None:
    """Return what the main process has to say; None on the others."""
    if not session.processes.main:
        return None
    thinking, tokens = (sum(getattr(r, n) for r in responses) for n in ("think_tokens", "tokens"))
    return ComputeResult(
        trait=trait,
        model=session.metadata.id,
        path=path,
        filtered=filtered,
        thinking=Thinking(
            answers=sum(response.think_tokens > 0 for response in responses),
            of=len(responses),
            tokens=thinking,
            share=thinking / tokens if tokens else 0.0,
            averaged=averaged,
        ),
        summary=summary,
        empty=sum(counts["kept"] - summary.counts[sign] for sign, counts in filtered.items()),
        merged=sum(response.merged for response in responses),
        next=(f"pvec vector show {path}",),
    )


# -- rows of a CSV --------------------------------------------------------------------------------


def _tokenised(
    answers: Mapping[Sign, Sequence[JudgedAnswer]], session: ModelSession
) -> Iterator[Contribution]:
    rows = [(sign, number, row) for sign in answers for number, row in enumerate(answers[sign])]
    paired = len(answers["pos"]) == len(answers["neg"])
    for done, (sign, number, row) in enumerate(rows, start=1):
        answer = KeptAnswer(
            id=f"{sign}-{number}",
            sign=sign,
            question=row.question_id or row.question or row.prompt,
            pair=str(number) if paired else "",
        )
        yield _tokenise(answer, row, session)
        session.on_progress(
            Progress(stage="tokenising", done=done, total=len(rows), unit="answers")
        )


def _tokenise(answer: KeptAnswer, row: JudgedAnswer, session: ModelSession) -> Contribution:
    tokenizer = session.metadata.tokenizer
    pair = encode_pair(tokenizer, prompt=row.prompt, answer=row.answer)
    head, tail = pair.token_ids[: pair.prompt_length], pair.token_ids[pair.prompt_length :]
    thinking = think_length(tokenizer, tail, prompt_ids=head)
    return Contribution(
        answer=answer,
        spans=spans_from_ids(
            answer.id, prompt_ids=head, answer_ids=tail, skip=0 if session.thinking else thinking
        ),
        tokens=len(tail),
        think_tokens=thinking,
        merged=pair.merged,
    )


def _filter_rows(
    answers: Mapping[Sign, Sequence[JudgedAnswer]],
    *,
    paths: Mapping[Sign, Path],
    settings: Settings,
) -> FilterResult:
    """Filter by score; with ``--paired`` row i of one file belongs to row i of the other."""
    counts = {sign: len(rows) for sign, rows in answers.items()}
    if settings.filter.paired and counts["pos"] != counts["neg"]:
        raise InputError(
            f"--paired needs row i of both files to belong together, but {paths['pos']} has "
            f"{counts['pos']} rows and {paths['neg']} {counts['neg']}: omit --paired."
        )
    return filter_responses(
        [
            ScoredResponse(
                id=f"{sign}-{number}",
                sign=sign,
                trait=row.trait_score,
                coherence=row.coherence,
                pair=number,
            )
            for sign, rows in answers.items()
            for number, row in enumerate(rows)
        ],
        **settings.filter.model_dump(),
    )
