"""``pvec project --shift``: how far finetuning moved a model along vectors (paper, section 4).

The shift of a checkpoint is the mean over prompts of its last-prompt-token activation minus the
base model's, projected on the vector. Adapters are put on the one loaded base in turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pvec.backends.hf.backend import HFBackend
from pvec.backends.planned import OnProgress, PromptCache, question_messages
from pvec.backends.run_session import manifest_sections
from pvec.backends.session import ModelSession, Notify, ignore
from pvec.data.conversations import Ids
from pvec.errors import InputError, ModelError
from pvec.models.adapters import adapted, find_adapter
from pvec.projection.inputs import open_source
from pvec.projection.projector import Directions, Projector, open_directions
from pvec.projection.samples import open_samples
from pvec.projection.study import open_study
from pvec.runs.names import run_name
from pvec.runs.store import Run, list_runs
from pvec.runs.summary import SHIFT_KIND, write_summary
from pvec.settings import Settings
from pvec.stats import Correlation, Interval, bootstrap_mean, correlation
from pvec.traits.trait import load_trait
from pvec.types import Progress


@dataclass(frozen=True, kw_only=True)
class Shift:
    """One checkpoint along one vector at one layer: its shift in units of the residual stream with
    a 95 % interval over prompts, and the trait score of its answers where a run has it.
    """

    checkpoint: str
    vector: str
    layer: int
    shift: Interval
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class ShiftTrend:
    """How shifts go with trait scores over the checkpoints that have both, by value and by rank.

    The base counts too, at shift 0, where a run holds its ``base_score``.
    """

    vector: str
    layer: int
    base_score: float | None
    pearson: Correlation
    spearman: Correlation


@dataclass(frozen=True, kw_only=True)
class ShiftResult:
    """What was measured. ``trends`` holds those vectors for which three or more scores exist."""

    run: Path
    base: str
    checkpoints: tuple[str, ...]
    prompts: int
    shifts: tuple[Shift, ...]
    trends: tuple[ShiftTrend, ...] = ()
    next: tuple[str, ...] = ()


def run(
    settings: Settings,
    models: Sequence[str],
    vectors: Sequence[str | Path],
    *,
    traits: Sequence[str] = (),
    questions: Path | None = None,
    out: Path | None = None,
    notify: Notify = ignore,
    on_progress: OnProgress = ignore,
) -> ShiftResult:
    """Measure the shift of each of ``models[1:]`` from the base ``models[0]``.

    The prompts are the evaluation questions of ``traits`` (default: those of the vectors), or
    those of the file ``questions``. Raises ``InputError`` or ``ModelError`` for wrong input before
    weights are loaded.
    """
    if len(models) < 2:
        raise InputError("--shift takes the base model and at least one finetuned model after it.")
    base, *checkpoints = models
    settings = _on_base(settings, base)
    adapters = {name: find_adapter(base, name) for name in checkpoints}
    with ModelSession(settings, notify=notify, on_progress=on_progress) as session:
        directions = open_directions(settings, vectors, session, notify=notify)
        prompts = _prompts(session, directions, settings, traits=traits, questions=questions)
        folder = out or settings.paths.runs / run_name("shift", model=base, adapter=None)
        identity = {
            "trait": "finetuning shift",
            "model": session.metadata.id,
            "fingerprint": session.metadata.fingerprint,
        }
        with open_study(folder, kind=SHIFT_KIND, identity=identity) as store:
            store.begin_session(**manifest_sections(session))
            measure = _Measure(directions, prompts)
            on_progress(_progress(0, len(models)))
            at_base = measure(_backend(session), session)
            values: dict[str, np.ndarray] = {}
            for number, (name, files) in enumerate(adapters.items(), start=1):
                if files is not None:
                    values[name] = _with_adapter(session, measure, files)
                on_progress(_progress(number, len(models)))
            session.__exit__(None, None, None)  # whole models come one at a time
            for name, files in adapters.items():
                if files is None:
                    values[name] = _of_model(settings, name, session, measure, notify=notify)
            on_progress(_progress(len(models), len(models)))
            ordered = {name: values[name] - at_base for name in checkpoints}
            result = _result(settings, base, ordered, directions, store.path)
            write_summary(store.path, dataclasses.asdict(result))
            store.end_session(timings={})
    return result


class _Measure:
    """Projections of the prompts' last tokens on a model, ``[prompts, vectors, layers]``."""

    def __init__(self, directions: Directions, prompts: Sequence[tuple[int, ...]]) -> None:
        self.plan = directions.plan_of("prompt_last_proj")
        self.prompts = prompts
        self._shape = (len(prompts), len(directions.vectors), len(directions.layers))

    def __call__(self, backend: HFBackend, session: ModelSession) -> np.ndarray:
        project = Projector(
            backend, self.plan, tokenizer=session.metadata.tokenizer, limit=session.metadata.context
        )
        made = project([Ids(prompt_ids=ids, answer_ids=()) for ids in self.prompts])
        return np.array([turns[0] for turns in made.rows], dtype=np.float64).reshape(self._shape)


def _with_adapter(session: ModelSession, measure: _Measure, files: object) -> np.ndarray:
    backend = _backend(session)
    plain = backend.model
    assert plain is not None
    try:
        with adapted(plain, files) as wrapped:  # type: ignore[arg-type]
            backend.model = wrapped  # type: ignore[assignment]
            return measure(backend, session)
    finally:
        backend.model = plain


def _of_model(
    settings: Settings, name: str, base: ModelSession, measure: _Measure, *, notify: Notify
) -> np.ndarray:
    """Measure a whole finetuned model, on the base's own prompts."""
    with ModelSession(_on_base(settings, name), notify=notify) as session:
        mine, theirs = session.metadata, base.metadata
        if (mine.num_layers, mine.hidden_size) != (theirs.num_layers, theirs.hidden_size):
            raise ModelError(
                f"{name} has {mine.num_layers} layers of width {mine.hidden_size} and {theirs.id} "
                f"{theirs.num_layers} of width {theirs.hidden_size}: give finetunes of the base."
            )
        return measure(_backend(session), session)


def _backend(session: ModelSession) -> HFBackend:
    backend = session.backend
    assert isinstance(backend, HFBackend)
    return backend


def _on_base(settings: Settings, name: str) -> Settings:
    """Return the settings with this model, no adapter, on transformers."""
    return settings.model_copy(
        update={
            "model": settings.model.model_copy(update={"id": name, "adapter": None}),
            "backend": settings.backend.model_copy(update={"name": "hf"}),
        }
    )


def _prompts(
    session: ModelSession,
    directions: Directions,
    settings: Settings,
    *,
    traits: Sequence[str],
    questions: Path | None,
) -> list[tuple[int, ...]]:
    if questions is not None:
        samples = open_samples(open_source(questions, settings.project), session, skip_bad=False)
        return [prompt.ids for prompt in samples.distinct.values()]
    names = traits or tuple(dict.fromkeys(v.trait for v in directions.vectors.values()))
    cache = PromptCache(session)
    texts = dict.fromkeys(q for name in names for q in load_trait(name).questions("eval"))
    return [cache(question_messages(text, system=None))[1] for text in texts]


def _result(
    settings: Settings,
    base: str,
    values: Mapping[str, np.ndarray],
    directions: Directions,
    folder: Path,
) -> ShiftResult:
    scores = dict(_scores(settings, [base, *values], directions))
    shifts = []
    for name, table in values.items():
        for v, (vector, loaded) in enumerate(directions.vectors.items()):
            for place, layer in enumerate(directions.layers):
                column = table[:, v, place]
                shifts.append(
                    Shift(
                        checkpoint=name,
                        vector=vector,
                        layer=layer,
                        shift=bootstrap_mean(column, groups=range(len(column))),
                        score=scores.get((name, loaded.trait)),
                    )
                )
    return ShiftResult(
        run=folder,
        base=base,
        checkpoints=tuple(values),
        prompts=len(next(iter(values.values()))),
        shifts=tuple(shifts),
        trends=tuple(_trends(shifts, base, scores, directions)),
        next=(f"pvec report {folder}",),
    )


def _trends(
    shifts: Sequence[Shift],
    base: str,
    scores: Mapping[tuple[str, str], float],
    directions: Directions,
) -> Iterator[ShiftTrend]:
    for vector, loaded in directions.vectors.items():
        for layer in directions.layers:
            pairs = [
                (one.shift.mean, one.score)
                for one in shifts
                if one.vector == vector and one.layer == layer and one.score is not None
            ]
            base_score = scores.get((base, loaded.trait))
            if base_score is not None:
                pairs.append((0.0, base_score))
            if len(pairs) >= 3:
                x, y = [p[0] for p in pairs], [p[1] for p in pairs]
                yield ShiftTrend(
                    vector=vector,
                    layer=layer,
                    base_score=base_score,
                    pearson=correlation(x, y),
                    spearman=correlation(x, y, method="spearman"),
                )


def _scores(
    settings: Settings, models: Sequence[str], directions: Directions
) -> Iterator[tuple[tuple[str, str], float]]:
    """Yield the mean trait scores of unsteered, uninstructed answers that runs hold of a model."""
    traits = {vector.trait for vector in directions.vectors.values()}
    places = {_place(name): name for name in models}
    for summary in list_runs(settings.paths.runs):
        if summary.problem or summary.kind != "steer-eval" or not summary.scores:
            continue
        seen = Run.read(summary.path)
        identity = seen.manifest["identity"]
        name = places.get(_place(str(identity.get("adapter") or identity["model"])))
        judges = seen.judges()
        if name is None or len(judges) != 1:
            continue
        found = seen.scores_by_response()
        for trait in traits:
            values = [
                score.score
                for record in seen.responses()
                if not record.steering and record.system is None
                if (score := found.get(record.id, {}).get(trait)) and score.score is not None
            ]
            if values:
                yield (name, trait), float(np.mean(values))


def _place(name: str) -> str:
    path = Path(name)
    return str(path.resolve()) if path.exists() else name


def _progress(done: int, total: int) -> Progress:
    return Progress(stage="checkpoints", done=done, total=total, unit="models")
