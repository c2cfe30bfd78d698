"""What commands leave in their runs for the report: the numbers of a result, a training's log."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from pvec.documents import Shape, misfit, read_json
from pvec.errors import StoreError
from pvec.runs.files import atomic_write
from pvec.runs.jsonl import read_jsonl

DIFF_KIND = "project-diff"
PROMPTS_KIND = "project-prompts"
SHIFT_KIND = "project-shift"
TOKENS_KIND = "project-tokens"

SUMMARY = "summary.json"
BROWSED = "browsed.jsonl"
"""Samples of a screened file with their texts, for reading in the report."""
LOG = "log.jsonl"
"""One line per logged step of a finetuning, appended as it goes."""

PREFIX = "persona/"
"""Every number of the persona shift in that log begins with this."""

LOW, HIGH = "persona_low/", "persona_high/"
"""The ends of its 95 % interval over prompts begin with these."""

ANSWERS = "persona_answers.jsonl"
"""Answers before and after a finetuning, ``question``, ``base`` and ``final``, where it was told to
generate some.
"""

HOOKS_ON = f"{PREFIX}hooks_on"
"""Measurements made so far with steering on: always 0, and proof of it."""


def write_summary(folder: Path, result: Mapping[str, Any]) -> None:
    """Write the numbers of a command's result into its run, replacing those of an earlier call."""
    with atomic_write(folder / SUMMARY, mode="w") as stream:
        stream.write(json.dumps(jsonable(result), indent=2, ensure_ascii=False) + "\n")


def update_summary(folder: Path, **sections: Mapping[str, Any]) -> None:
    """Write sections of a summary; entries of other keys stay as an earlier call wrote them."""
    kept = read_summary(folder) if (folder / SUMMARY).is_file() else {}
    write_summary(folder, {**kept, **{k: {**kept.get(k, {}), **v} for k, v in sections.items()}})


def read_summary(folder: Path, *, shape: Shape = dict) -> dict[str, Any]:
    """Return what ``write_summary`` wrote.

    Raises ``StoreError`` when there is none yet, or when it is not of ``shape``.
    """
    try:
        summary = read_json(folder / SUMMARY)
    except FileNotFoundError:
        raise StoreError(
            f"{folder} holds no results yet: run the command that made it again."
        ) from None
    wrong = misfit(summary, shape)
    if wrong is not None:
        raise StoreError(
            f"{folder / SUMMARY} is damaged (at {wrong}): run the command that made {folder} again."
        )
    return dict(summary)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return a training's log in order of steps; what a resumed run did again counts once."""
    lines: dict[tuple[float, bool, bool], dict[str, Any]] = {}
    for number, line in read_jsonl(folder / LOG):
        wrong = misfit(line, {"step": float, ...: (float, str, bool, NoneType, list)})
        if wrong is not None:
            raise StoreError(
                f"{folder / LOG}:{number} is not a line that pvec wrote (at {wrong}): delete it."
            )
        lines[line["step"], "eval_loss" in line, "train_loss" in line] = dict(line)
    return [lines[key] for key in sorted(lines)]


def jsonable(value: Any) -> Any:  # noqa: PLR0911 (a line per kind of value)
    """Return ``value`` as JSON can hold it: dataclasses and models as objects, arrays as lists,
    paths as text, NaN and infinities as null, secrets masked.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if hasattr(value, "model_dump"):  # a pydantic model; its secrets stay masked
        return jsonable(value.model_dump())
    if hasattr(value, "tolist"):  # numpy and torch, without importing them
        return jsonable(value.tolist())
    if isinstance(value, set | frozenset):
        return sorted(jsonable(item) for item in value)
    if isinstance(value, Iterable):
        return [jsonable(item) for item in value]
    return str(value)


def not_known_as_nan(value: Any) -> Any:
    """Read the numbers of an interval that are not known, null in JSON, as NaN."""
    if isinstance(value, list):
        return [not_known_as_nan(item) for item in value]
    if not isinstance(value, dict):
        return value
    bounds = {"mean", "low", "high"}
    return {
        k: math.nan if v is None and k in bounds else not_known_as_nan(v) for k, v in value.items()
    }
