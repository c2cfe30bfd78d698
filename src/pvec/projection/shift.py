"""``pvec shift``: how far finetuning moved a model along vectors (paper, section 4).

The shift of a checkpoint is the mean over prompts of its last-prompt-token activation minus the
base model's, projected on the vector. Adapters are put on the one loaded base in turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

import numpy as np

from pvec.backends.planned import OnProgress, PromptCache, question_messages
from pvec.backends.session import ModelSession, Notify, ignore, open_session
from pvec.errors import InputError, ModelError
from pvec.models.adapters import find_adapter
from pvec.notebook import HtmlResult
from pvec.projection.checkpoints import KeptProjections, measure_all, weights_hash
from pvec.projection.inputs import open_run, open_samples, open_source
from pvec.projection.projector import LoadedVectors, open_vectors
from pvec.runs.manifest import list_runs
from pvec.runs.names import run_name
from pvec.runs.responses import stable_hash
from pvec.runs.store import Run
from pvec.runs.summary import SHIFT_KIND, SUMMARY, read_summary, write_summary
from pvec.settings import Settings
from pvec.stats import SCORES, Correlation, Interval, correlation, grouped_mean
from pvec.traits.trait import load_trait
from pvec.types import DEFAULT_OUTPUT, OutputOptions


@dataclass(frozen=True, kw_only=True)
class Shift:
    """One checkpoint along one vector at one layer: its shift in units of the residual stream with
    a 95 % interval over prompts, and the trait score of its answers where a run has it, alone and
    with its interval over questions.
    """

    checkpoint: str
    vector: str
    layer: int
    shift: Interval
    score: float | None = None
    score_interval: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class ShiftTrend:
    """How shifts go with trait scores over the checkpoints that have both, by value and by rank.

    The base counts too, at shift 0, where a run holds its ``base_score`` (``base_interval``).
    """

    vector: str
    layer: int
    base_score: float | None
    pearson: Correlation
    spearman: Correlation
    base_interval: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class ShiftResult(HtmlResult):
    """What was measured. ``trends`` holds those vectors for which three or more scores exist."""

    run: Path
    base: str
    checkpoints: tuple[str, ...]
    prompts: int
    shifts: tuple[Shift, ...]
    trends: tuple[ShiftTrend, ...] = ()
    next: tuple[str, ...] = ()


def run(  # noqa: PLR0913 (what to measure: each is an option)
    settings: Settings,
    models: Sequence[str],
    vectors: Sequence[str | Path],
    *,
    traits: Sequence[str] = (),
    questions: Path | None = None,
    output: OutputOptions = DEFAULT_OUTPUT,
    lender: ModelSession | None = None,
    notify: Notify = ignore,
    on_progress: OnProgress = ignore,
) -> ShiftResult:
    """Measure the shift of each of ``models[1:]`` from the base ``models[0]``.

    The prompts are the evaluation questions of ``traits`` (default: those of the vectors), or
    those of the file ``questions``. The base is loaded by ``lender``, if there is one (see
    ``ModelSession.lend``). Raises ``InputError`` or ``ModelError`` for wrong input before
    weights are loaded.
    """
    if len(models) < 2:
        raise InputError("Give the base model and at least one finetuned model after it.")
    base, *checkpoints = models
    settings = on_base(settings, base)
    adapters = {name: find_adapter(base, name) for name in checkpoints}
    with open_session(settings, lender=lender, notify=notify, on_progress=on_progress) as session:
        loaded = open_vectors(session, vectors)
        prompts = _prompts(session, loaded, traits=traits, questions=questions, output=output)
        wholes = {
            name: whole_model(name, session) for name, files in adapters.items() if files is None
        }
        measured = stable_hash(
            {
                "checkpoints": [_place(name) for name in checkpoints],
                "vectors": loaded.fingerprints,
                "layers": list(loaded.layers),
                "prompts": [list(ids) for ids in prompts],
            }
        )
        folder = _free_folder(
            settings, base, out=output.out, measured=measured, checkpoints=checkpoints
        )
        identity = {
            "trait": "finetuning shift",
            "model": session.metadata.id,
            "fingerprint": session.metadata.fingerprint,
        }
        with open_run(session, folder, kind=SHIFT_KIND, identity=identity) as work:
            work.store.update_manifest(measured=measured, projection_axes=loaded.axes())
            with work.store.stage("capture"):
                kept = KeptProjections(folder, weights_hash(measured, adapters, wholes))
                values = measure_all(session, adapters, wholes, loaded, prompts, kept)
            places = {name: str(f.adapter_folder) if f else name for name, f in adapters.items()}
            scores = dict(_scores(settings, {base: base, **places}, loaded))
            result = _result(base, values, loaded, scores, folder)
            write_summary(folder, dataclasses.asdict(result))
            kept.remove()
    return result


def _free_folder(
    settings: Settings, base: str, *, out: Path | None, measured: str, checkpoints: Sequence[str]
) -> Path:
    """Return the run of this very measurement, or a folder that holds no other one.

    By default ``runs/shift-BASE``, then ``runs/shift-BASE-2`` and so on. Raises ``InputError``
    where ``out`` holds another measurement: its results would be overwritten.
    """
    if out is not None:
        if _holds_another(out, measured, checkpoints):
            raise InputError(
                f"{out} holds a shift of other checkpoints, vectors or prompts, which would be "
                f"overwritten: give another --out."
            )
        return out
    folder = settings.paths.runs / run_name("shift", model=base, adapter=None)
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    return next(
        path
        for path in chain([folder], numbered)
        if not _holds_another(path, measured, checkpoints)
    )


def _holds_another(folder: Path, measured: str, checkpoints: Sequence[str]) -> bool:
    """Whether the results in ``folder`` are of another measurement."""
    if not (folder / SUMMARY).is_file():
        return False
    recorded = Run.read(folder).manifest.get("measured")
    if recorded is None:  # a run of version 0.1, which noted the checkpoints only
        return list(read_summary(folder)["checkpoints"]) != list(checkpoints)
    return bool(recorded != measured)


def whole_model(name: str, base: ModelSession) -> ModelSession:
    """Return a whole finetuned model, of the base's shape; its weights are not loaded yet."""
    session = ModelSession(on_base(base.settings, name), notify=base.notify)
    finetuned, original = session.metadata, base.metadata
    if (finetuned.num_layers, finetuned.hidden_size) != (original.num_layers, original.hidden_size):
        raise ModelError(
            f"{name} has {finetuned.num_layers} layers of width {finetuned.hidden_size} and "
            f"{original.id} {original.num_layers} of width {original.hidden_size}: "
            f"give finetunes of the base."
        )
    return session


def on_base(settings: Settings, name: str) -> Settings:
    """Return the settings with this model, no adapter, on transformers."""
    return settings.model_copy(
        update={
            "model": settings.model.model_copy(update={"id": name, "adapter": None}),
            "backend": settings.backend.model_copy(update={"name": "hf"}),
        }
    )


def _prompts(
    session: ModelSession,
    vectors: LoadedVectors,
    *,
    traits: Sequence[str],
    questions: Path | None,
    output: OutputOptions,
) -> list[tuple[int, ...]]:
    if questions is not None:
        source = open_source(questions, session.settings.project)
        samples = open_samples(source, session, skip_bad=output.skip_bad)
        return [prompt.ids for prompt in samples.distinct.values()]
    names = traits or tuple(dict.fromkeys(v.trait for v in vectors.vectors.values()))
    cache = PromptCache(session)
    texts = dict.fromkeys(q for name in names for q in load_trait(name).questions("eval"))
    return [cache(question_messages(text, system=None))[1] for text in texts]


def _result(
    base: str,
    values: Mapping[str, np.ndarray],
    vectors: LoadedVectors,
    scores: Mapping[tuple[str, str], Interval],
    folder: Path,
) -> ShiftResult:
    shifts = [
        Shift(
            checkpoint=name,
            vector=vector,
            layer=layer,
            shift=grouped_mean(table[:, column], groups=range(len(table))),
            score=score.mean if score is not None else None,
            score_interval=score,
        )
        for name, table in ((n, t.reshape(len(t), -1)) for n, t in values.items())
        for column, (vector, layer) in enumerate(vectors.columns)
        for score in [scores.get((name, vectors.vectors[vector].trait))]
    ]
    return ShiftResult(
        run=folder,
        base=base,
        checkpoints=tuple(values),
        prompts=len(next(iter(values.values()))),
        shifts=tuple(shifts),
        trends=tuple(_trends(shifts, base, scores, vectors)),
        next=(f"pvec report {folder}",),
    )


def _trends(
    shifts: Sequence[Shift],
    base: str,
    scores: Mapping[tuple[str, str], Interval],
    vectors: LoadedVectors,
) -> Iterator[ShiftTrend]:
    for vector, layer in vectors.columns:
        pairs = [
            (shift.shift.mean, shift.score)
            for shift in shifts
            if shift.vector == vector and shift.layer == layer and shift.score is not None
        ]
        base_score = scores.get((base, vectors.vectors[vector].trait))
        if base_score is not None:
            pairs.append((0.0, base_score.mean))
        if len(pairs) >= 3:
            x, y = zip(*pairs, strict=True)
            yield ShiftTrend(
                vector=vector,
                layer=layer,
                base_score=base_score.mean if base_score is not None else None,
                base_interval=base_score,
                pearson=correlation(x, y),
                spearman=correlation(x, y, method="spearman"),
            )


def _scores(
    settings: Settings, models: Mapping[str, str], vectors: LoadedVectors
) -> Iterator[tuple[tuple[str, str], Interval]]:
    """Yield the mean trait scores of unsteered, uninstructed answers that runs hold of a model.

    ``models`` has the place of each: of a training's folder that of its adapter.
    """
    traits = {vector.trait for vector in vectors.vectors.values()}
    places = {_place(place): name for name, place in models.items()}
    for summary in list_runs(settings.paths.runs):
        if summary.problem or summary.kind != "steer-eval" or not summary.scores:
            continue
        store = Run.read(summary.path)
        identity = store.manifest["identity"]
        name = places.get(_place(str(identity.get("adapter") or identity["model"])))
        judges = store.judges()
        if name is None or len(judges) != 1:
            continue
        scores = store.scores_by_response()
        for trait in traits:
            scored = [
                (record.question_id, score.score)
                for record in store.responses()
                if not record.steering and record.system is None
                if (score := scores.get(record.id, {}).get(trait)) and score.score is not None
            ]
            if scored:
                questions, values = zip(*scored, strict=True)
                yield (name, trait), grouped_mean(values, groups=questions, limits=SCORES)


def _place(name: str) -> str:
    path = Path(name)
    return str(path.resolve()) if path.exists() else name
