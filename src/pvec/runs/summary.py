"""What projecting commands leave in their runs for the report: one JSON file of numbers each."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pvec.errors import StoreError
from pvec.runs.files import atomic_write

DIFF_KIND = "project-diff"
PROMPTS_KIND = "project-prompts"
SHIFT_KIND = "project-shift"

SUMMARY = "summary.json"


def write_summary(folder: Path, result: Mapping[str, Any]) -> None:
    """Write the numbers of a command's result into its run, replacing those of an earlier call."""
    with atomic_write(folder / SUMMARY, mode="w") as stream:
        stream.write(json.dumps(_plain(result), indent=2, ensure_ascii=False) + "\n")


def read_summary(folder: Path) -> dict[str, Any]:
    """Return what ``write_summary`` wrote. Raises ``StoreError`` when there is none yet."""
    try:
        found: dict[str, Any] = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise StoreError(
            f"{folder} holds no results yet: run the command that made it again."
        ) from exc
    return found


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON can hold it; NaN and infinities become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
