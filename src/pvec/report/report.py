"""``pvec report``: one page about one or more runs, with its figures' numbers beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pvec import __version__
from pvec.errors import InputError
from pvec.report.figure import Figure, write_figures
from pvec.report.page import Chapter, Section, render_page
from pvec.report.sections import build_chapters
from pvec.report.sections.common import RunData
from pvec.runs.files import atomic_write, probe_target
from pvec.runs.store import Run


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """The page, the files written beside it (CSV always, SVG and PNG when asked), what it says."""

    page: Path
    files: tuple[Path, ...]
    findings: tuple[str, ...]


def run(
    paths: Sequence[Path],
    *,
    out: Path | None = None,
    formats: Sequence[str] = (),
    judge: str | None = None,
) -> ReportResult:
    """Write the report of the runs in ``paths``.

    ``out`` is the page (default: ``report.html`` in the run's folder, or in the working directory
    for several runs); figures go into ``NAME_figures`` beside it. ``judge`` chooses among several
    judges' scores. Raises ``InputError`` or ``StoreError`` before anything is written.
    """
    runs = _read(paths, judge)
    page = out or (paths[0] / "report.html" if len(paths) == 1 else Path("report.html"))
    if page.is_dir():
        raise InputError(f"--out {page} is a folder: give the page a name, such as report.html.")
    probe_target(page)
    chapters = build_chapters(runs)
    html = render_page(
        title=_title(runs, chapters),
        chapters=chapters,
        made=datetime.now().astimezone(),
        version=__version__,
    )
    files = write_figures(_figures(chapters), page.parent / f"{page.stem}_figures", formats=formats)
    with atomic_write(page, mode="w") as stream:
        stream.write(html)
    return ReportResult(
        page=page,
        files=tuple(files),
        findings=tuple(chapter.summary for chapter in chapters),
    )


def sections_of(paths: Sequence[Path], *, judge: str | None = None) -> list[Section]:
    """Return what the page of these runs would show. Raises as ``run`` does."""
    return [
        section for chapter in build_chapters(_read(paths, judge)) for section in chapter.sections
    ]


def _read(paths: Sequence[Path], judge: str | None) -> list[RunData]:
    if not paths:
        raise InputError("No run was named: give one or more run folders.")
    runs = []
    for path in paths:
        found = Run.read(path)
        runs.append(RunData(run=found, judge=found.choose_judge(judge)))
    twice = [name for name, count in Counter(run.id for run in runs).items() if count > 1]
    if twice:
        raise InputError(f"Two runs are named {twice[0]!r}: name each run once, or rename one.")
    return runs


def _title(runs: Sequence[RunData], chapters: Sequence[Chapter]) -> str:
    """Return the page's title: that of its only section, or what several are about."""
    sections = [section for chapter in chapters for section in chapter.sections]
    if len(sections) == 1:
        return sections[0].title
    traits = list(dict.fromkeys(run.trait for run in runs))
    models = list(dict.fromkeys(run.model for run in runs))
    named = ", ".join(traits[:-1]) + " and " + traits[-1] if len(traits) > 1 else traits[0]
    return f"{named} in {', '.join(models)}"


def _figures(chapters: Sequence[Chapter]) -> list[Figure]:
    return [
        figure
        for chapter in chapters
        for section in chapter.sections
        for figure in section.exported
    ]
