"""What a page shows of each kind of run: one module per kind, found by name.

To add a kind, write a module here with ``section(run) -> Section`` and give it a line in
``MODULES``. With ``read(run)`` it gets what that returns instead of the run; with
``overview(found)`` several runs have a section before theirs that compares them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pvec.errors import InputError
from pvec.report.page import Chapter, Section
from pvec.report.sections.common import RunData

MODULES: Mapping[str, str] = {
    "steer-eval": "pvec.report.sections.steer_eval",
    "extract": "pvec.report.sections.extract",
    "train": "pvec.report.sections.train",
    "project-diff": "pvec.report.sections.screening",
    "project-prompts": "pvec.report.sections.monitoring",
    "project-shift": "pvec.report.sections.shift",
    "project-tokens": "pvec.report.sections.tokens",
}
"""Kind of run → module, in the order of a page."""


def build_chapters(runs: Sequence[RunData]) -> list[Chapter]:
    """Return one chapter per kind of run, in the order of ``MODULES``.

    Raises ``InputError`` for a run of a kind that no section knows.
    """
    for run in runs:
        if run.kind not in MODULES:
            raise InputError(
                f"{run.path} is a run of {run.kind!r}, which pvec report does not show yet: "
                f"it shows {', '.join(MODULES)}."
            )
    return [
        _chapter(importlib.import_module(MODULES[kind]), own)
        for kind in MODULES
        if (own := [run for run in runs if run.kind == kind])
    ]


def _chapter(module: Any, runs: Sequence[RunData]) -> Chapter:
    found = [module.read(run) if hasattr(module, "read") else run for run in runs]
    sections = tuple(
        _section_of(run, module.section(one)) for run, one in zip(runs, found, strict=True)
    )
    if len(runs) > 1 and hasattr(module, "overview"):
        overview: Section = module.overview(found)
        return Chapter(summary=overview.summary, sections=(overview, *sections))
    return Chapter(summary=" ".join(section.summary for section in sections), sections=sections)


def _section_of(run: RunData, section: Section) -> Section:
    """Return a section with what it says of its run as all do."""
    provenance = (*run.provenance(), *section.provenance)
    return replace(section, id=run.id, source=run.source, provenance=provenance)
