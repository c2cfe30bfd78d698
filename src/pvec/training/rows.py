"""Chat rows for training: read from files or the hub, and all that is wrong with them at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pvec.errors import InputError, did_you_mean, install_command
from pvec.types import Message

HUB = "hf:"
"""A source that begins with this is a data set of the hub: ``hf:NAME`` or ``hf:NAME:SPLIT``."""

ROLES = frozenset(("system", "user", "assistant"))

_SHOWN = 20
"""Faults that a message lists; the rest is counted."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One conversation and where it stands (``file:line``)."""

    where: str
    messages: tuple[Message, ...]


def read_rows(sources: Sequence[str]) -> list[Row]:
    """Read every conversation of ``sources``.

    Raises ``InputError`` naming file and line of *every* row that is empty, malformed or without
    an assistant turn, and for a source that cannot be read or holds nothing.
    """
    rows: list[Row] = []
    faults: list[str] = []
    for source in sources:
        before = len(rows) + len(faults)
        for where, content in _contents(source):
            fault = content if isinstance(content, str) else _fault(content)
            if fault:
                faults.append(f"{where}: {fault}")
            elif not isinstance(content, str):
                rows.append(Row(where=where, messages=tuple(content["messages"])))
        if len(rows) + len(faults) == before:
            faults.append(f"{source}: it holds no rows")
    if faults:
        shown = "; ".join(faults[:_SHOWN])
        more = f"; and {len(faults) - _SHOWN:,} more" if len(faults) > _SHOWN else ""
        rows_are = "row is" if len(faults) == 1 else "rows are"
        raise InputError(f"{len(faults):,} training {rows_are} wrong: {shown}{more}.")
    return rows


def _contents(source: str) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    """Yield ``(where, row)``, or ``(where, what is wrong)`` for a line that is no row."""
    if source.startswith(HUB):
        name, _, split = source.removeprefix(HUB).partition(":")
        yield from _from_datasets(source, name, split=split or "train")
        return
    path = Path(source).expanduser()
    if not path.is_file():
        near = did_you_mean(path.name, [p.name for p in _siblings(path)])
        raise InputError(f"There is no data file {source}.{near}")
    if path.suffix == ".parquet":
        yield from _from_datasets(source, "parquet", split="train", data_files=str(path))
    elif path.suffix == ".json":
        yield from _from_json(source, path)
    elif path.suffix == ".jsonl":
        yield from _from_jsonl(source, path)
    else:
        raise InputError(f"{source} is not a data file: it should be .jsonl, .json or .parquet.")


def _from_jsonl(source: str, path: Path) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{source}:{number}"
            if not line.strip():
                yield where, "the line is empty"
                continue
            try:
                yield where, json.loads(line)
            except UnicodeDecodeError:
                yield where, "it is not UTF-8"
            except json.JSONDecodeError as error:
                yield where, f"it is not JSON ({error.msg} at column {error.colno})"


def _from_json(source: str, path: Path) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    try:
        content = json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{source} is not JSON ({error}).") from None
    if not isinstance(content, list):
        raise InputError(f"{source} must hold a list of rows.")
    for number, row in enumerate(content):
        yield f"{source}[{number}]", row


def _from_datasets(
    source: str, name: str, *, split: str, **files: str
) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"Reading {source} needs the datasets package: {install_command('train')}."
        ) from None
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    try:
        table = datasets.load_dataset(name, split=split, **files)
    except (DatasetNotFoundError, DatasetGenerationError, ValueError, OSError) as error:
        first = str(error).split("\n", maxsplit=1)[0]
        raise InputError(f"The data set {source} cannot be read ({first}).") from None
    for number, row in enumerate(table):
        yield f"{source}[{number}]", row


def _fault(row: Any) -> str:
    """Return what is wrong with a row, or nothing."""
    if not isinstance(row, Mapping) or not isinstance(row.get("messages"), list):
        return "it has no list of messages"
    for message in row["messages"]:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            return "a message is not a role with a text"
        if message.get("role") not in ROLES:
            return f"the role {message.get('role')!r} is not system, user or assistant"
    answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
    if not answers:
        return "it has no assistant turn"
    if not all(answer.strip() for answer in answers):
        return "an assistant turn is empty"
    return ""


def _siblings(path: Path) -> list[Path]:
    return list(path.parent.glob("*.jsonl")) if path.parent.is_dir() else []
