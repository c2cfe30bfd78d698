"""A command on every cell of a grid: what is missing runs, model by model; failures are listed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from pvec.backends.base import Backend
from pvec.backends.session import ModelSession, Notify, ignore
from pvec.errors import InputError, PvecError
from pvec.grid.commands import COMMANDS, GridCommand, Job
from pvec.grid.file import read_grid_file
from pvec.judges.plan import RunPlan
from pvec.judges.scoring import ResponseScorer
from pvec.runs.files import os_error_sentence, probe_writable, writer_lock
from pvec.runs.grid import GridCell, GridFolder, read_grid
from pvec.settings import Settings
from pvec.types import Progress

_FORESEEN = (PvecError, OSError, MemoryError, RuntimeError)
"""What ends one cell and not the grid; torch's own errors are RuntimeErrors."""


@dataclass(frozen=True, kw_only=True)
class GridResult:
    """What a command did on a grid: its cells, and how many of them ran in this call."""

    folder: Path
    command: str
    cells: tuple[GridCell, ...]
    ran: int
    next: tuple[str, ...] = ()

    @property
    def failed(self) -> tuple[GridCell, ...]:
        """The cells that failed."""
        return tuple(cell for cell in self.cells if cell.state == "failed")

    def require_all(self) -> None:
        """Raise ``PvecError`` that names the first failure, if there is one."""
        if self.failed:
            first = self.failed[0]
            raise PvecError(
                f"{len(self.failed)} of {len(self.cells)} cells failed, the first: {first.label} "
                f"({first.reason.rstrip('.')}). What is done is kept, and the same command tries "
                "again what failed."
            )


@dataclass(frozen=True, kw_only=True)
class PlannedCell:
    """What one cell lacks. ``plan`` is None for a finished cell, and for one with a ``problem``."""

    cell: GridCell
    plan: RunPlan | None = None
    problem: str = ""

    @property
    def seconds(self) -> float | None:
        """How long the cell takes on the workers that were asked for; None where that is not
        known.
        """
        if self.plan is None or self.plan.resources is None or not self.plan.resources.times:
            return None
        needs = self.plan.resources
        own = [time for time in needs.times if time.workers == needs.workers]
        return (own or needs.times)[0].seconds


@dataclass(frozen=True, kw_only=True)
class GridPlan:
    """What ``--dry-run`` tells of a grid: its cells and their sums.

    ``dollars`` is None where the price of a judge is unknown.
    """

    folder: Path
    command: str
    cells: tuple[PlannedCell, ...]
    answers: int
    missing: int
    most_tokens: int
    judge_calls: int
    dollars: float | None
    seconds: float
    """Sum of the cells whose time is known."""


class GridSession(ModelSession):
    """A model that is loaded once for all its cells. One that cannot be loaded is not tried again
    for each of them.
    """

    _failure: Exception | None = None

    @property
    def backend(self) -> Backend:
        """The loaded model. Raises what the first try to load it raised."""
        if self._failure is not None:
            raise self._failure
        try:
            return super().backend
        except _FORESEEN as error:
            self._failure = error
            raise


@dataclass(kw_only=True)
class _Grid:
    """A grid that is open: the jobs, the models, and the folder as it is now."""

    command: GridCommand
    folder: GridFolder
    sessions: Mapping[str, ModelSession]

    def known(self, job: Job) -> GridCell:
        """Return a cell as the folder has it, pending where what it follows from has changed."""
        stored = {cell.run: cell for cell in self.folder.cells}.get(job.cell.run, job.cell)
        if stored.state == "done" and not self._is_current(stored, job):
            return job.cell
        return stored

    def _is_current(self, cell: GridCell, job: Job) -> bool:
        try:
            inputs = self.command.inputs(job, self.sessions[job.model.label])
        except PvecError:
            return False  # the run says why
        return cell.inputs == inputs and self.command.result(job).is_file()

    def keep(self, *cells: GridCell) -> None:
        """Note how cells are now."""
        self.folder = self.folder.with_cells(cells)
        self.folder.write()


def plan(
    settings: Settings,
    path: Path,
    command: str,
    *,
    arguments: Mapping[str, Any] | None = None,
    out: Path | None = None,
    notify: Notify = ignore,
) -> GridPlan:
    """Say what ``run`` would do and what judging would cost; loads no weights, asks nobody.

    A cell that cannot be planned, such as one whose vector is still to be made, says why. Raises
    what ``run`` raises for a bad grid file, model or trait.
    """
    with _opened(settings, path, command, arguments or {}, out, notify, ignore) as grid:
        planned = tuple(_planned(grid, job) for job in grid.command.jobs)
    plans = [cell.plan for cell in planned if cell.plan is not None]
    costs = [plan.dollars for plan in plans]
    return GridPlan(
        folder=grid.folder.path,
        command=command,
        cells=planned,
        answers=sum(plan.answers for plan in plans),
        missing=sum(plan.missing for plan in plans),
        most_tokens=sum(plan.most_tokens for plan in plans),
        judge_calls=sum(plan.judge_calls for plan in plans),
        dollars=None if None in costs else sum(cost for cost in costs if cost is not None),
        seconds=sum(cell.seconds or 0.0 for cell in planned),
    )


def run(
    settings: Settings,
    path: Path,
    command: str,
    *,
    arguments: Mapping[str, Any] | None = None,
    out: Path | None = None,
    notify: Notify = ignore,
    on_progress: Callable[[Progress], None] = ignore,
) -> GridResult:
    """Run ``command`` on every cell of the grid file ``path`` that is not finished.

    Cells are ordinary runs in the folder ``out`` (default: ``runs/NAME``), and ``grid.json`` lists
    them with their state. Each model is loaded once. A cell that fails is listed with its reason
    and stops no other; what ends the command in the middle leaves a grid that it continues.
    ``arguments`` are those of the command's workflow, the same for all cells.

    Raises ``InputError``, ``ModelError``, ``JudgeError`` or ``StoreError`` for a bad grid file,
    model, trait or judge before any weights are loaded.
    """
    with ExitStack() as stack:
        grid = stack.enter_context(
            _opened(settings, path, command, arguments or {}, out, notify, on_progress)
        )
        for session in grid.sessions.values() if grid.command.judged else ():
            with ResponseScorer.of(session):  # a missing key is found now
                pass
        if grid.command.needs_vectors:
            _require_vectors(grid.command)
        probe_writable(grid.folder.path)
        stack.enter_context(writer_lock(grid.folder.path / ".lock"))
        grid.folder = read_grid(grid.folder.path)  # as the lock's last owner left it
        for note in (*grid.command.notes, *_forget_others(grid)):
            notify(note)
        cells = {job.cell.run: grid.known(job) for job in grid.command.jobs}
        grid.keep(*cells.values())
        left = [job for job in grid.command.jobs if cells[job.cell.run].state != "done"]
        _run_jobs(grid, left, on_progress=on_progress)
        return GridResult(
            folder=grid.folder.path,
            command=command,
            cells=grid.folder.of(command),
            ran=len(left),
            next=(f"pvec report {grid.folder.path}",),
        )


def _run_jobs(grid: _Grid, left: list[Job], *, on_progress: Callable[[Progress], None]) -> None:
    """Run the jobs, those of one model after one another."""
    total = len(grid.command.jobs)
    done = total - len(left)

    def show(detail: str) -> None:
        on_progress(
            Progress(stage="grid", done=done, total=total, unit="cells", detail=detail, outer=True)
        )

    last: ModelSession | None = None
    for label, jobs in groupby(left, key=lambda job: job.model.label):
        session = grid.sessions[label]
        if last is not None and _workers_of(last) != _workers_of(session):
            last.close()  # its workers make room
        for job in jobs:
            show(f"now {job.cell.label}")
            grid.keep(_attempt(grid.command, job, session))
            done += 1
        session.free()
        last = session
    show("")


def _workers_of(session: ModelSession) -> tuple[str, str]:
    """Return what sessions with the same workers have in common, where a pool runs the models."""
    return session.choice.name, session.settings.model.device


def _attempt(command: GridCommand, job: Job, session: ModelSession) -> GridCell:
    """Run a job and return its cell, done or failed."""
    try:
        inputs = command.inputs(job, session)
        command.run(job, session)
    except _FORESEEN as error:
        if isinstance(error, BrokenPipeError) or _is_interruption(error):
            raise
        reason = os_error_sentence(error) if isinstance(error, OSError) else str(error)
        session.notify(f"failed: {job.cell.label}: {reason}")
        return replace(job.cell, state="failed", reason=reason or type(error).__name__)
    return replace(job.cell, state="done", inputs=inputs)


def _is_interruption(error: BaseException) -> bool:
    """Whether a signal ended the work: Python wraps what its handler raises inside an import."""
    cause = error.__cause__ or error.__context__
    return isinstance(cause, KeyboardInterrupt | SystemExit)


@contextmanager
def _opened(
    settings: Settings, path: Path, command: str, arguments: Mapping[str, Any],
    out: Path | None, notify: Notify, on_progress: Callable[[Progress], None],
) -> Iterator[_Grid]:  # fmt: skip
    """Read the grid file, its traits, the folder and all models, without weights."""
    file = read_grid_file(path)
    folder = read_grid(out or settings.paths.runs / file.name)
    work = COMMANDS[command](settings, file, folder.path, arguments)
    first = {job.model.label: job for job in reversed(work.jobs)}
    with ExitStack() as stack:
        sessions = {
            label: stack.enter_context(
                GridSession(job.settings, notify=notify, on_progress=on_progress)
            )
            for label, job in first.items()
        }
        yield _Grid(command=work, folder=folder, sessions=sessions)


def _planned(grid: _Grid, job: Job) -> PlannedCell:
    cell = grid.known(job)
    if cell.state == "done":
        return PlannedCell(cell=cell)
    try:
        made = grid.command.plan(job, grid.sessions[job.model.label])
    except PvecError as error:
        return PlannedCell(cell=cell, problem=str(error))
    return PlannedCell(cell=cell, plan=made)


def _require_vectors(command: GridCommand) -> None:
    """Raise ``InputError`` where no cell has a vector: the extraction comes first."""
    problems: list[InputError] = []
    for job in command.jobs:
        try:
            command.vector(job)
        except InputError as error:
            problems.append(error)
    if len(problems) == len(command.jobs):
        raise problems[0]


def _forget_others(grid: _Grid) -> list[str]:
    """Leave the command's cells that the file does not name any more out, and say so."""
    names = {job.cell.run for job in grid.command.jobs}
    others = [cell for cell in grid.folder.of(grid.command.name) if cell.run not in names]
    if not others:
        return []
    kept = tuple(cell for cell in grid.folder.cells if cell not in others)
    grid.folder = replace(grid.folder, cells=kept)
    return [
        f"{len(others)} runs of {grid.folder.path} are not in the grid file any more, such as "
        f"{others[0].run}: their folders are kept, and the grid leaves them out"
    ]
