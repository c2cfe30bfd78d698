"""The run folders of screening and monitoring a file, and of a shift from a base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pvec.backends.run_session import RunSession, run_identity
from pvec.backends.session import ModelSession
from pvec.errors import StoreError
from pvec.runs.names import run_name
from pvec.runs.responses import Json
from pvec.traits.trait import Trait


def open_study(
    session: ModelSession,
    command: str,
    *,
    kind: str,
    path: Path,
    out: Path | None,
    traits: Sequence[Trait] = (),
) -> RunSession:
    """Open the run of a command on the file ``path`` or begin it: ``runs/screen-data-tiny``.

    ``kind`` is the run's on disk. Raises ``StoreError`` for a run of another identity.
    """
    identity = run_identity(session, subject={"trait": path.resolve().stem})
    folder = study_folder(session, command, path=path, out=out)
    return open_run(session, folder, kind=kind, identity=identity, traits=traits)


def study_folder(session: ModelSession, command: str, *, path: Path, out: Path | None) -> Path:
    """Return the run folder of a command on the file ``path``."""
    settings, adapter = session.settings, session.metadata.adapter
    name = run_name(command, path.resolve().stem, model=settings.model.id, adapter=adapter)
    return out or settings.paths.runs / name


def open_run(
    session: ModelSession,
    folder: Path,
    *,
    kind: str,
    identity: Mapping[str, Json],
    traits: Sequence[Trait] = (),
) -> RunSession:
    """Open the run in ``folder`` or begin it. Raises ``StoreError`` for one of another identity."""
    try:
        return RunSession(session, folder, kind=kind, identity=identity, traits=traits)
    except StoreError as error:
        raise StoreError(f"{error} (--out names the folder)") from error
