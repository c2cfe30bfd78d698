"""``pvec report``: one page about one or more runs, with its figures' numbers beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING

from pvec import __version__
from pvec.documents import misfit
from pvec.errors import InputError, StoreError
from pvec.report.figure import write_figures
from pvec.report.page import Chapter, Section, Widget, render_page, script_of_part
from pvec.report.sections import build_chapters, served
from pvec.report.sections.common import RunData, listed
from pvec.runs.files import atomic_write, probe_target
from pvec.runs.grid import is_grid, read_grid
from pvec.runs.manifest import FILE_NAME
from pvec.runs.store import Run

if TYPE_CHECKING:
    from pvec.report.sections.grid_numbers import GridNumbers


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """The page, the files written beside it (CSV always, SVG and PNG when asked), what it says, and
    the ``parts`` that it loads on demand.
    """

    page: Path
    files: tuple[Path, ...]
    findings: tuple[str, ...]
    parts: tuple[Path, ...] = ()
    grids: tuple[GridNumbers, ...] = ()
    """All numbers of the grids among the runs."""


def run(
    paths: Sequence[Path],
    *,
    out: Path | None = None,
    formats: Sequence[str] = (),
    judge: str | None = None,
    beside: bool = False,
) -> ReportResult:
    """Write the report of the runs in ``paths``, which may also be folders of a grid and logs of
    ``pvec serve``.

    ``out`` is the page (default: ``report.html`` in the run's folder, or in the working directory
    for several runs and for logs); figures go into ``NAME_figures`` beside it. ``judge`` chooses
    among several judges' scores. With ``beside`` the tokens of answers go into files beside the
    page, so that it can open all of them, however many. Raises ``InputError`` or ``StoreError``
    before anything is written.
    """
    logs = [path for path in paths if path.is_file() and path.name != FILE_NAME]
    grids = _grids([path for path in paths if is_grid(path)], judge)
    folders = [path for path in paths if path not in logs and not is_grid(path)]
    runs = _read(folders, judge, beside=beside) if folders or not (logs or grids) else []
    own = len(paths) == 1 and not logs
    page = out or (paths[0] / "report.html" if own else Path("report.html"))
    if page.is_dir():
        raise InputError(f"--out {page} is a folder: give the page a name, such as report.html.")
    probe_target(page)
    chapters = [
        *(chapter for _, chapter in grids),
        *build_chapters(runs),
        *([served.build(logs)] if logs else []),
    ]
    sections = [section for chapter in chapters for section in chapter.sections]
    widgets = [widget for section in sections for widget in section.widgets if widget.beside]
    if beside and not widgets:
        raise InputError("--beside has no effect here: only tokens (`pvec project --tokens`) do.")
    html = render_page(
        title=_title(runs, chapters),
        chapters=chapters,
        made=datetime.now().astimezone(),
        version=__version__,
        parts=f"{page.stem}_parts",
    )
    parts = _write_parts(widgets, page.parent / f"{page.stem}_parts")
    figures = [figure for section in sections for figure in section.exported]
    files = write_figures(figures, page.parent / f"{page.stem}_figures", formats=formats)
    with atomic_write(page, mode="w") as stream:
        stream.write(html)
    return ReportResult(
        page=page,
        files=tuple(files),
        parts=tuple(parts),
        grids=tuple(numbers for numbers, _ in grids),
        findings=tuple(chapter.summary for chapter in chapters),
    )


def sections_of(paths: Sequence[Path], *, judge: str | None = None) -> list[Section]:
    """Return what the page of these runs would show. Raises as ``run`` does."""
    return [
        section for chapter in build_chapters(_read(paths, judge)) for section in chapter.sections
    ]


def _grids(folders: Sequence[Path], judge: str | None) -> list[tuple[GridNumbers, Chapter]]:
    """Return numbers and chapter of each grid."""
    if not folders:
        return []
    from pvec.report.sections.grid import build
    from pvec.report.sections.grid_numbers import GridRuns, grid_numbers

    runs = [GridRuns(grid=read_grid(folder), judge=judge) for folder in folders]
    return [(numbers := grid_numbers(grid), build(grid, numbers)) for grid in runs]


_IDENTITY = {"trait": str, "model": str, "adapter": (str, NoneType)}
"""What the page says of every run."""


def _read(paths: Sequence[Path], judge: str | None, *, beside: bool = False) -> list[RunData]:
    if not paths:
        raise InputError("No run was named: give one or more run folders.")
    runs = []
    for path in paths:
        found = Run.read(path)
        wrong = misfit({"adapter": None, **found.manifest["identity"]}, _IDENTITY)
        if wrong is not None:
            raise StoreError(
                f"{path / FILE_NAME} is damaged (its identity has no {wrong!r}, or another kind of "
                "value there); restore it from a copy."
            )
        runs.append(RunData(run=found, judge=found.choose_judge(judge), everything=beside))
    twice = [name for name, count in Counter(run.id for run in runs).items() if count > 1]
    if twice:
        raise InputError(f"Two runs are named {twice[0]!r}: name each run once, or rename one.")
    return runs


def _title(runs: Sequence[RunData], chapters: Sequence[Chapter]) -> str:
    """Return the page's title: that of its only section or of the one that compares all runs, or
    what runs of several kinds are about.
    """
    sections = [section for chapter in chapters for section in chapter.sections]
    if len(sections) == 1 or (len(chapters) == 1 and len(sections) > len(runs)):
        return sections[0].title
    if not runs:
        return listed(section.title for section in sections)
    about = [run for run in runs if run.kind in ("extract", "steer-eval")] or runs
    return f"{listed(run.trait for run in about)} in {listed(run.model for run in runs)}"


def _write_parts(widgets: Sequence[Widget], folder: Path) -> list[Path]:
    """Write what pages load on demand, and remove what an earlier page left."""
    written = []
    for widget in widgets:
        for old in (folder / widget.beside).glob("*.js"):
            old.unlink()
        for number in range(len(widget.parts)):
            written.append(folder / widget.beside / f"{number:05}.js")
            with atomic_write(written[-1], mode="w") as stream:
                stream.write(script_of_part(widget, number))
    return written
