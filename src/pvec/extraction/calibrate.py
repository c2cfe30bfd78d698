"""``pvec vector calibrate``: where unsteered answers lie along a vector.

The percentiles of positive and negative answers come with the vector; those of answers without
instruction are what a ceiling or floor such as ``p25`` is read from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pvec.backends.planned import PromptCache, derive_seed, question_messages
from pvec.backends.session import ModelSession, Notify, ignore
from pvec.errors import InputError
from pvec.models.chat import spans_from_ids, think_length
from pvec.notebook import HtmlResult
from pvec.settings import Settings
from pvec.traits.trait import Trait, load_trait
from pvec.types import Progress, Request, TokenSpans
from pvec.vectors.files import find_vector, load_vector, load_vectors, output_path, save_vector
from pvec.vectors.projection import project_layers, quantiles_of
from pvec.vectors.show import Percentiles, percentiles_of
from pvec.vectors.vector import DEFAULT_KIND, PersonaVector, with_metadata

ENOUGH = 10
"""Fewer answers than this have no percentiles."""


@dataclass(frozen=True, kw_only=True)
class CalibrateResult(HtmlResult):
    """What was measured: ``answers`` have a token, ``percentiles`` are of all classes."""

    path: Path
    model: str
    questions: int
    answers: int
    percentiles: Percentiles
    next: tuple[str, ...] = ()


def calibrate(
    settings: Settings,
    file: Path,
    *,
    trait: str | None = None,
    own_model: bool = False,
    notify: Notify = ignore,
    on_progress: Callable[[Progress], None] = ignore,
) -> CalibrateResult:
    """Add the percentiles of unsteered answers' projections to a vector file.

    ``trait`` is whose extraction questions are asked (default: the vector's), ``own_model`` takes
    the model from the file. Raises ``InputError`` for a file of another format than .safetensors,
    a vector without ``response_avg`` and fewer than ten answers, ``ModelError`` for another model.
    """
    path = find_vector(file)
    if path.suffix != ".safetensors":
        raise InputError(
            f"{path} cannot hold percentiles: convert it with `pvec vector convert {path} "
            f"{path.stem}.safetensors`."
        )
    output_path(path, trait="")
    if own_model:
        settings = with_model_of_vector(settings, load_vector(path))
    questions = _questions(load_trait(trait or load_vector(path).trait), settings)
    with ModelSession(settings, notify=notify, on_progress=on_progress) as session:
        (vector,) = load_vectors([path], model=session.metadata, notify=notify).values()
        rows = vector.kind(DEFAULT_KIND)
        spans = _unsteered_answers(session, questions)
        if len(spans) < ENOUGH:
            raise InputError(
                f"{len(spans)} answers have a token, and percentiles need {ENOUGH}: ask for more "
                f"with --rollouts or --limit."
            )
        means = [answer.means["response"] for answer in session.backend.capture(spans)]
        places = project_layers(np.stack(means), rows)
        model = session.metadata.id
    stats = {**vector.stats, **quantiles_of("unsteered", places)}
    measured = with_metadata(replace(vector, stats=stats), unsteered_answers=str(len(spans)))
    save_vector(measured, path)
    return CalibrateResult(
        path=path,
        model=model,
        questions=len(questions),
        answers=len(spans),
        percentiles=percentiles_of(measured),
        next=(
            f"pvec steer-eval --trait {vector.trait} --vector {path} --operator cap --coef p25,p50",
        ),
    )


def with_model_of_vector(settings: Settings, vector: PersonaVector) -> Settings:
    """Return ``settings`` with the model and adapter that a vector file names, if it does."""
    if not vector.metadata.get("model_id"):
        return settings
    adapter = vector.metadata.get("adapter") or None
    named = {"id": vector.metadata["model_id"], "adapter": adapter}
    return settings.model_copy(update={"model": settings.model.model_copy(update=named)})


def _questions(trait: Trait, settings: Settings) -> list[str]:
    questions = list(trait.questions("extract")[: settings.extract.limit])
    if not questions:
        raise InputError(f"The trait {trait.name!r} has no extraction questions: add some.")
    return questions


def _unsteered_answers(session: ModelSession, questions: list[str]) -> list[TokenSpans]:
    """Answer the questions without instruction and return the answers that have a token."""
    prompts, settings = PromptCache(session), session.settings
    requests = {}
    for number, question in enumerate(questions):
        _, ids = prompts(question_messages(question, system=None))
        for rollout in range(settings.extract.rollouts):
            seed = derive_seed(settings.generation.seed, "unsteered", number, rollout)
            name = f"{number}/{rollout}"
            requests[name] = Request(id=name, prompt_ids=ids, sampling=session.sampling(seed))
    spans = []
    for done, answer in enumerate(session.backend.generate(list(requests.values())), start=1):
        ids, tokens = requests[answer.id].prompt_ids, answer.token_ids
        skip = think_length(session.metadata.tokenizer, tokens, prompt_ids=ids)
        if len(tokens) > skip:
            spans.append(spans_from_ids(answer.id, prompt_ids=ids, answer_ids=tokens, skip=skip))
        session.on_progress(
            Progress(stage="unsteered", done=done, total=len(requests), unit="answers")
        )
    return sorted(spans, key=lambda span: span.id)
