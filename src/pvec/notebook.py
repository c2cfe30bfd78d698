"""How a notebook shows the result of a function: its fields as tables, numbers with intervals."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

_ROWS = 60
"""Most rows of a table; the object holds the rest."""


class HtmlResult:
    """A dataclass that a notebook shows as HTML (``_repr_html_``)."""

    def _repr_html_(self) -> str:
        return _fields(self, title=type(self).__name__)


def _fields(value: Any, *, title: str) -> str:
    """Return the fields of a dataclass: the simple ones in one table, the others below it."""
    simple: list[tuple[str, str]] = []
    below: list[str] = []
    for field in dataclasses.fields(value):
        held = getattr(value, field.name)
        if _is_record(held) and not _is_interval(held):
            below.append(_fields(held, title=field.name))
        elif isinstance(held, list | tuple) and held and _is_record(held[0]):
            below.append(_records(field.name, held))
        elif not _is_empty(held):
            simple.append((field.name, _text(held)))
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{v}</td></tr>" for k, v in simple)
    return f"<h4>{html.escape(title)}</h4><table>{rows}</table>{''.join(below)}"


def _records(title: str, records: Sequence[Any]) -> str:
    """Return a table of records of one kind: a column for each field that any of them has."""
    names = [
        field.name
        for field in dataclasses.fields(records[0])
        if not all(_is_empty(getattr(record, field.name)) for record in records)
    ]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(getattr(record, name))}</td>" for name in names) + "</tr>"
        for record in records[:_ROWS]
    )
    more = f"<p>… and {len(records) - _ROWS:,} more</p>" if len(records) > _ROWS else ""
    return f"<h4>{html.escape(title)}</h4><table><tr>{head}</tr>{body}</table>{more}"


def _text(value: Any) -> str:
    """Return a value as escaped text of one cell."""
    if _is_interval(value):
        known = not math.isnan(value.low)
        ends = f" ({_number(value.low)} to {_number(value.high)})" if known else ""
        return f"{_number(value.mean)}{ends}"
    if _is_record(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return "<br>".join(f"{html.escape(str(k))}: {_text(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _number(value)
    return html.escape({True: "yes", False: "no", None: "–"}.get(value, str(value)))


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | tuple | list | Mapping) and not value)


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _is_interval(value: Any) -> bool:
    return _is_record(value) and all(hasattr(value, end) for end in ("mean", "low", "high"))


def _number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}".replace("-", "\u2212")
    return "–" if math.isnan(value) else f"{value:,.4g}".replace("-", "\u2212")
