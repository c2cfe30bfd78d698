"""What runs in a worker process: models by key, and jobs that exchange items for results.

A plain class: ``cluster`` makes a Ray actor of it, tests run it on a thread. Nothing is written
here; the run store stays with the command.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pvec.backends.base import Backend
from pvec.backends.pool.jobs import Feed, Job, Numbered, run_job
from pvec.backends.registry import BackendName
from pvec.errors import ModelError, PvecError
from pvec.models.costs import Machine
from pvec.models.files import ModelSpec
from pvec.runs.manifest import package_versions
from pvec.settings import Settings
from pvec.types import ModelInfo, Progress


@dataclass(frozen=True, kw_only=True)
class ModelOrder:
    """A model that workers load: everything that is needed for it, and no secret."""

    key: str
    spec: ModelSpec
    backend: BackendName
    settings: Settings
    fingerprint: str
    """Of the model as the command sees it; a worker that finds another refuses."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model that a worker has loaded. ``rows``: how many answers it works on at once."""

    info: ModelInfo
    rows: int
    captures_while_generating: bool


@dataclass(kw_only=True)
class Exchange:
    """What has happened since the last exchange; ``ended``: nothing follows, and with an ``error``
    it is the reason.
    """

    results: list[Numbered] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    progress: Mapping[str, float] = field(default_factory=dict)
    error: PvecError | None = None
    ended: bool = False


class Worker:
    """One process with an engine. Its methods are called one at a time."""

    def __init__(self, *, threads: int | None = None) -> None:
        """Compute on ``threads`` CPU threads (None: as many as PyTorch takes)."""
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        self._models: dict[str, Backend] = {}
        self._objects: dict[str, Any] = {}
        self._turn = threading.Lock()  # one job computes at a time: hooks are on the model
        self._running: dict[int, _Running] = {}

    def describe(self) -> dict[str, Any]:
        """Return host, process and the versions that results depend on."""
        return {"host": socket.gethostname(), "pid": os.getpid(), "versions": package_versions()}

    def dtype(self, order: ModelOrder) -> str | PvecError:
        """Return the number format that this worker would choose, without loading the model."""
        from pvec.models.load import choose_device, inspect_model
        from pvec.models.precision import choose_dtype

        try:
            stored = inspect_model(order.spec).stored_dtype if order.backend == "hf" else "float32"
            device = choose_device(order.spec.device)[0]
            return str(choose_dtype(order.spec.dtype, device, stored=stored)[0])
        except PvecError as error:
            return error

    def machine(self, order: ModelOrder) -> tuple[Machine, int] | PvecError:
        """Measure one device in the format of ``order``; also return how many GPUs there are."""
        import torch

        from pvec.models.load import choose_device
        from pvec.models.machine import measure_machine

        try:
            device = choose_device(order.spec.device)[0]
        except PvecError as error:
            return error
        dtype = getattr(torch, order.spec.dtype)
        machine = measure_machine(device, dtype=dtype, threads=torch.get_num_threads())
        return machine, torch.cuda.device_count() if device.startswith("cuda") else 0

    def open(self, order: ModelOrder) -> Opened | PvecError:
        """Load a model; the reason where that fails."""
        try:
            if order.key not in self._models:
                self._models[order.key] = self._load(order)
        except PvecError as error:
            return error
        backend = self._models[order.key]
        return Opened(
            info=backend.info,
            rows=backend.rows_at_once,
            captures_while_generating=backend.captures_while_generating,
        )

    def drop(self, key: str) -> None:
        """Free a model."""
        if (backend := self._models.pop(key, None)) is not None:
            backend.close()

    def exchange(
        self, job: Job, items: Sequence[Numbered], *, end: bool = False, wait: float = 1.0
    ) -> Exchange:
        """Take in ``items`` and return what was finished, after ``wait`` seconds at the latest.

        The first exchange of a job begins it; with ``end`` no items follow.
        """
        running = self._running.get(job.number)
        if running is None:
            running = self._running[job.number] = _Running(self._models[job.key], job, self._turn)
        running.feed.put(items)
        if end:
            running.feed.end()
        done = running.collect(wait)
        if done.ended:
            del self._running[job.number]
        return done

    def stop(self, number: int) -> None:
        """Abandon a job: what is under way is computed and thrown away."""
        if (running := self._running.pop(number, None)) is not None:
            running.stop()

    def call(self, key: str, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(backend, *args)``, or the ``PvecError`` that it raised."""
        try:
            with self._turn:
                return function(self._models[key], *args)
        except PvecError as error:
            return error

    def attach(self, name: str, factory: Callable[..., Any], key: str, *args: Any) -> None:
        """Keep ``factory(backend, *args)`` in this process under a name."""
        self._objects[name] = factory(self._models[key], *args)

    def ask(self, name: str, method: str, *args: Any) -> Any:
        """Call a method of an object that was attached."""
        return getattr(self._objects[name], method)(*args)

    def _load(self, order: ModelOrder) -> Backend:
        from pvec.backends.registry import backend_class
        from pvec.models.load import inspect_model

        where = f"The worker on {socket.gethostname()}"
        try:
            metadata = inspect_model(order.spec)
        except PvecError as error:
            raise type(error)(
                f"{where} cannot use the model: {error} A folder must be on a disk that every "
                f"machine sees under the same path."
            ) from None
        if metadata.fingerprint != order.fingerprint:
            raise ModelError(
                f"{where} finds other weights or another tokenizer under {order.spec.model!r} than "
                f"this machine: give both the same files."
            )
        return backend_class(order.backend).from_settings(
            order.spec, order.settings, metadata=metadata, on_note=self._note
        )

    def _note(self, text: str) -> None:
        for running in self._running.values():
            running.note(text)


class _Running:
    """A job at work on a thread of its own."""

    def __init__(self, backend: Backend, job: Job, turn: threading.Lock) -> None:
        self.feed = Feed(turn)
        self._news = threading.Condition()
        self._out = Exchange()
        self._fault: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(
            target=self._work, args=(backend, job, turn), name=f"job {job.number}", daemon=True
        )
        self._thread.start()

    def collect(self, wait: float) -> Exchange:
        """Return what there is, waiting for a result or an error; raises a fault of pvec."""
        with self._news:
            self._news.wait_for(lambda: self._out.results or self._out.ended, wait)
            done, self._out = self._out, Exchange(progress=self._out.progress)
            self._out.ended = done.ended
        if self._fault is not None:
            raise self._fault
        return done

    def note(self, text: str) -> None:
        """Pass a sentence on to the command."""
        with self._news:
            self._out.notes.append(text)

    def stop(self) -> None:
        """End the thread at its next result."""
        self._stopped = True
        self.feed.end()

    def _work(self, backend: Backend, job: Job, turn: threading.Lock) -> None:
        backend.on_progress = self._progress
        results = run_job(backend, job, self.feed)
        error: PvecError | None = None
        try:
            while not self._stopped:
                with turn:
                    result = next(results, None)
                if result is None:
                    break
                self._put(result)
        except PvecError as known:
            error = known
        except Exception as fault:  # a fault of pvec is raised where the command sees it
            self._fault = fault
        finally:
            with turn:
                results.close()
            with self._news:  # with the last word, so that no exchange takes one without the other
                self._out.error, self._out.ended = error, True
                self._news.notify_all()

    def _put(self, result: Numbered) -> None:
        with self._news:
            self._out.results.append(result)
            self._news.notify_all()

    def _progress(self, progress: Progress) -> None:
        self._out.progress = dict(progress.extra)
