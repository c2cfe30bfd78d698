"""A run's ``manifest.json``: what the run is, and what has been done in it.

The *identity* is the part that must not change: answers made under another one do not belong in
the same folder. Everything else may be updated.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType
from typing import Any

from pvec.documents import DocumentError, misfit, read_json
from pvec.errors import StoreError
from pvec.runs.files import atomic_write
from pvec.runs.secrets import safe_command, without_secrets

FILE_NAME = "manifest.json"
TRAITS = "traits"
"""Folder of a run with the definitions of its traits."""
FORMAT = "pvec-run"
FORMAT_VERSION = 1

_ABSENT = object()
_SHAPE = {
    "format_version": int,
    "kind": str,
    "created": str,
    "identity": dict,
    "sessions": [{"command": [str], "started": str, "ended": (str, NoneType)}],
}
"""What every manifest has."""
_PACKAGES = ("pvec", "torch", "transformers", "peft", "vllm", "numpy")


def new_manifest(*, kind: str, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest of a run that begins now."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "created": timestamp(),
        "identity": identity,
        "versions": package_versions(),
        "sessions": [],
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest in ``folder``, without the secrets that earlier versions kept in it.

    Raises ``StoreError`` when there is none to be read.
    """
    path = folder / FILE_NAME
    try:
        manifest = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(
            f"{folder} is not a run folder (it has no {FILE_NAME}); "
            "give the folder of a run, or a new one."
        ) from None
    except DocumentError as exc:
        raise _damaged(path, exc.problem) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreError(
            f"{folder} is not a run folder: pvec did not write its {FILE_NAME}; give another one."
        )
    version = manifest.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise StoreError(
            f"{folder} was made by a newer pvec (run format {version}, this "
            f"one reads up to {FORMAT_VERSION}); update pvec or use another folder."
        )
    wrong = misfit(manifest, _SHAPE)
    if wrong is None:
        timings = [session.get("timings") or {} for session in manifest["sessions"]]
        wrong = misfit(timings, [{...: float}], "timings")
        wrong = wrong or misfit(manifest.get("calibration", {}), {...: str}, "calibration")
    if wrong is not None:
        raise _damaged(path, f"it has no {wrong!r}, or another kind of value there")
    safe: dict[str, Any] = without_secrets(manifest)
    for session in safe["sessions"]:
        session["command"] = safe_command(session["command"])
    return safe


def _damaged(path: Path, problem: str) -> StoreError:
    return StoreError(
        f"{path} is damaged ({problem}); restore it from a copy or start a new run folder."
    )


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Replace the manifest in ``folder`` as a whole, without secrets (``runs.secrets``).

    Raises ``StoreError`` when it cannot be written.
    """
    text = json.dumps(without_secrets(manifest), indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_write(folder / FILE_NAME, mode="w") as stream:
        stream.write(text + "\n")


def refuse_foreign(folder: Path) -> None:
    """Raise ``StoreError`` for a folder that holds something and no run.

    A kill at the very start leaves hidden files, which do not count.
    """
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"cannot write into {folder}: that is a file; choose another path.")
    begun = (folder / FILE_NAME).exists() or not folder.is_dir()
    if not begun and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise StoreError(
            f"{folder} is not empty and not a run folder; choose a new or an empty one."
        )


def manifest_to_continue(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the manifest of the run in ``folder``, or None where one has still to begin.

    A run of another identity is refused once there is something in it, with a ``StoreError`` that
    names what differs (the first three of it), old and new: one whose command failed before it made
    anything does not stand in the way of the corrected command.
    """
    if not (folder / FILE_NAME).exists():
        return None
    manifest = read_manifest(folder)
    current = without_secrets(json.loads(json.dumps(identity)))
    differences = list(_differences(manifest["identity"], current))
    if not differences:
        return manifest
    if not _holds_results(folder):
        return None
    examples = "; ".join(
        f"{key}: {_shown(old)} → {_shown(new)}" for key, old, new in differences[:3]
    )
    more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
    raise StoreError(
        f"{folder} holds a run of another configuration ({examples}{more}); "
        "choose another run folder, or go back to the old setting to continue this one."
    )


def _holds_results(folder: Path) -> bool:
    """Whether a run holds more than what a command writes before its work begins."""
    return any(
        path.is_file() and path.stat().st_size > 0
        for path in folder.rglob("*")
        if path.name != FILE_NAME and not path.name.startswith(".") and path.parent.name != TRAITS
    )


def package_versions() -> dict[str, str]:
    """Return the versions of Python, pvec and the packages that could change a result."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # an optional one that is not installed
    return versions


def timestamp() -> str:
    """Return the time now, in UTC to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield ``(dotted key, old, new)`` for every leaf that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            path = f"{prefix}.{key}" if prefix else str(key)
            yield from _differences(old.get(key, _ABSENT), new.get(key, _ABSENT), path)
    elif old != new:
        yield prefix, old, new


def _shown(value: Any, *, limit: int = 80) -> str:
    if value is _ABSENT:
        return "not set"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[:limit]}…"


# ── the runs of a folder, one line each ─────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A run in one line of a listing; ``problem`` says why it cannot be read, or is empty."""

    path: Path
    kind: str = ""
    created: str = ""
    responses: int = 0
    scores: int = 0
    vectors: tuple[str, ...] = ()
    finished: bool = False
    problem: str = ""


def list_runs(root: str | Path) -> list[RunSummary]:
    """Return the runs in ``root`` and one folder level below, the latest first.

    A run that cannot be read is listed with its problem.
    """
    folders = {
        manifest.parent
        for pattern in (f"*/{FILE_NAME}", f"*/*/{FILE_NAME}")
        for manifest in Path(root).glob(pattern)
    }
    return sorted(map(_summary, folders), key=lambda run: (run.created, run.path), reverse=True)


def _summary(folder: Path) -> RunSummary:
    try:
        manifest = read_manifest(folder)
    except StoreError as exc:
        return RunSummary(path=folder, problem=str(exc))
    sessions = manifest["sessions"]
    return RunSummary(
        path=folder,
        kind=manifest["kind"],
        created=manifest["created"],
        responses=_count_lines(folder / "responses.jsonl"),
        scores=_count_lines(folder / "scores.jsonl"),
        vectors=tuple(sorted(p.stem for p in (folder / "vectors").glob("*.safetensors"))),
        finished=bool(sessions) and sessions[-1]["ended"] is not None,
    )


def _count_lines(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))
