"""What a page shows of each kind of run: one module per kind, found by name.

To add a kind, write a module here with ``build(runs) -> Chapter`` and give it a line in
``BUILDERS``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pvec.errors import InputError
from pvec.report.page import Chapter
from pvec.report.sections.common import RunData

Builder = Callable[[Sequence[RunData]], Chapter]

BUILDERS: Mapping[str, str] = {
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
    """Return one chapter per kind of run, in the order of ``BUILDERS``.

    Raises ``InputError`` for a run of a kind that no section knows.
    """
    for run in runs:
        if run.kind not in BUILDERS:
            raise InputError(
                f"{run.path} is a run of {run.kind!r}, which pvec report does not show yet: "
                f"it shows {', '.join(BUILDERS)}."
            )
    return [
        _builder(kind)([run for run in runs if run.kind == kind])
        for kind in BUILDERS
        if any(run.kind == kind for run in runs)
    ]


def _builder(kind: str) -> Builder:
    module: Any = importlib.import_module(BUILDERS[kind])
    found: Builder = module.build
    return found
