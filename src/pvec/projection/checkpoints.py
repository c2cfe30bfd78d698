"""The checkpoints of ``pvec shift``, measured one after another or by many workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pvec.backends.base import Backend
from pvec.backends.hf.backend import HFBackend
from pvec.backends.pool.backend import PoolBackend
from pvec.backends.session import ModelSession
from pvec.data.conversations import Ids
from pvec.models.adapters import adapted
from pvec.models.files import ModelFiles, ModelSpec
from pvec.models.fingerprint import model_fingerprint
from pvec.projection.projector import LoadedVectors, Projector
from pvec.runs.jsonl import JsonlLog, read_jsonl
from pvec.runs.responses import stable_hash
from pvec.settings import Settings
from pvec.types import Progress
from pvec.vectors.projection import ProjectionPlan

_BASE = ""
"""The name of the base among the checkpoints, where nothing has that name."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """One model to measure: the base, the base with an ``adapter``, or a ``whole`` model."""

    name: str
    plan: ProjectionPlan
    prompts: Sequence[tuple[int, ...]]
    limit: int | None
    adapter: ModelFiles | None = None
    whole: tuple[ModelSpec, Settings] | None = None

    def measure(self, backend: Backend) -> np.ndarray:
        """Return the projections of ``backend``'s model, ``[prompts, vectors, layers]``."""
        project = Projector(backend, self.plan, tokenizer=backend.tokenizer, limit=self.limit)
        rows = project([Ids(prompt_ids=ids, answer_ids=()) for ids in self.prompts]).rows
        shape = (len(rows), len(self.plan.vectors), len(self.plan.layers))
        return np.array([turns[0] for turns in rows], dtype=np.float64).reshape(shape)


def measure_checkpoint(backend: Backend, checkpoint: Checkpoint) -> np.ndarray:
    """Measure ``checkpoint`` where ``backend`` has its base: in this process or in a worker.

    A whole model takes the base's place, so whole ones come last.
    """
    assert isinstance(backend, HFBackend)
    if checkpoint.adapter is not None:
        with _adapter_on(backend, checkpoint.adapter) as finetuned:
            return checkpoint.measure(finetuned)
    if checkpoint.whole is None:
        return checkpoint.measure(backend)
    backend.close()  # there may be room for one
    spec, settings = checkpoint.whole
    whole = HFBackend.from_settings(spec, settings)
    try:
        return checkpoint.measure(whole)
    finally:
        whole.close()


def weights_hash(
    measured: str, adapters: Mapping[str, ModelFiles | None], wholes: Mapping[str, ModelSession]
) -> str:
    """Return what tells a measurement of these very weights from others."""
    prints = {name: model_fingerprint(files) for name, files in adapters.items() if files}
    prints |= {name: whole.metadata.fingerprint for name, whole in wholes.items()}
    return stable_hash({"measured": measured, "weights": prints})


class KeptProjections:
    """The projections of every checkpoint that was measured, on disk until all of them are."""

    def __init__(self, folder: Path, measured: str) -> None:
        self._path = folder / "measured.jsonl"
        self._measured = measured
        self.values: dict[str, np.ndarray] = {}
        if self._path.is_file():
            for _, line in read_jsonl(self._path):
                if line["measured"] == measured:
                    self.values[line["checkpoint"]] = np.array(line["values"])

    def keep(self, name: str, values: np.ndarray) -> None:
        """Keep the projections of a checkpoint, also from a kill.

        Those that are not finite, of a damaged one, are not worth a line.
        """
        self.values[name] = values
        if not np.isfinite(values).all():
            return
        line = {"measured": self._measured, "checkpoint": name, "values": values.tolist()}
        with JsonlLog(self._path) as log:
            log.append(line)

    def remove(self) -> None:
        """Remove them from disk, where the results are."""
        self._path.unlink(missing_ok=True)


def measure_all(
    session: ModelSession,
    adapters: Mapping[str, ModelFiles | None],
    wholes: Mapping[str, ModelSession],
    vectors: LoadedVectors,
    prompts: Sequence[tuple[int, ...]],
    kept: KeptProjections,
) -> dict[str, np.ndarray]:
    """Return each checkpoint's projections minus the base's, ``[prompts, vectors, layers]``.

    Adapters are put on the one base in turn; whole models come after it is freed, one at a time.
    On a pool every worker does so with the checkpoints that it is given.
    """
    plan, limit = vectors.plan_of("prompt_last_proj"), session.metadata.context
    of = partial(Checkpoint, plan=plan, prompts=prompts, limit=limit)
    adapted_ones = [of(name=name, adapter=files) for name, files in adapters.items() if files]
    whole_ones = [
        # with what a backend is loaded with; keys of judges and other secrets stay here
        of(name=name, whole=(whole.spec, Settings(backend=whole.settings.backend)))
        for name, whole in wholes.items()
    ]

    def report() -> None:
        done, total = len(kept.values), len(adapters) + 1
        session.on_progress(Progress(stage="checkpoints", done=done, total=total, unit="models"))

    for checkpoints in ([of(name=_BASE), *adapted_ones], whole_ones):
        due = [checkpoint for checkpoint in checkpoints if checkpoint.name not in kept.values]
        report()
        for number, values in _measured(session, due, wholes):
            kept.keep(due[number].name, values)
            report()
    return {name: kept.values[name] - kept.values[_BASE] for name in adapters}


def _measured(
    session: ModelSession, checkpoints: Sequence[Checkpoint], wholes: Mapping[str, ModelSession]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the number and the projections of each checkpoint as it is measured."""
    if not checkpoints:
        return
    if session.settings.pool.workers:
        backend = session.backend
        assert isinstance(backend, PoolBackend)
        yield from backend.map(measure_checkpoint, checkpoints)
        if checkpoints[0].whole is not None:
            session.free()  # the workers have closed it
        return
    for number, checkpoint in enumerate(checkpoints):
        if checkpoint.whole is None:
            yield number, measure_checkpoint(session.backend, checkpoint)
            continue
        session.free()
        with wholes[checkpoint.name] as whole:
            yield number, checkpoint.measure(whole.backend)


@contextmanager
def _adapter_on(backend: HFBackend, files: ModelFiles) -> Iterator[HFBackend]:
    plain = backend.model
    assert plain is not None
    try:
        with adapted(plain, files) as wrapped:
            backend.model = wrapped  # type: ignore[assignment]
            yield backend
    finally:
        backend.model = plain
