"""The run folders of screening, monitoring and shifts: their names, and what makes one theirs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pvec.backends.run_session import run_identity
from pvec.backends.session import ModelSession
from pvec.errors import StoreError
from pvec.runs.names import run_name
from pvec.runs.responses import Json
from pvec.runs.store import Run
from pvec.settings import Settings


def study_folder(settings: Settings, session: ModelSession, *, kind: str, path: Path) -> Path:
    """Return the default folder of a study of a file: ``runs/screen-data-tiny``."""
    name = run_name(
        kind, path.resolve().stem, model=settings.model.id, adapter=session.metadata.adapter
    )
    return settings.paths.runs / name


def study_identity(session: ModelSession, *, path: Path) -> dict[str, Json]:
    """Return what tells a study whose answers are generated from another one."""
    return run_identity(session, subject={"trait": path.resolve().stem})


def open_study(folder: Path, *, kind: str, identity: Mapping[str, Json]) -> Run:
    """Open the run of a study or begin it. Raises ``StoreError`` for one of another identity."""
    try:
        return Run.open_or_create(folder, kind=kind, identity=identity)
    except StoreError as error:
        raise StoreError(f"{error} (--out names the folder)") from error
