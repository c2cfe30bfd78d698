"""The runs of a folder, one line each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pvec.errors import StoreError
from pvec.runs.manifest import FILE_NAME, read_manifest


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
