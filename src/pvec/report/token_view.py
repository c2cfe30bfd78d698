"""Answers token by token as a page shows them: an index of all, and parts with the tokens."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pvec.report.style import decimals
from pvec.runs.tokens import TokenRecord

PASSAGE = 12
"""Tokens of a passage: about a clause. A shorter answer is one passage."""

PER_PART = 40
"""Answers that are loaded together."""

TOKEN_BUDGET = 1_500_000
"""Numbers (tokens times columns) that one page holds at most: about 12 MB."""

_LISTED = 15
"""Passages of a file that are listed, at either end of a column."""

_SNIPPET = 100

_SIGNS = {"high": 1, "low": -1}
"""Ends of a column: the highest passages and the lowest."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Passages:
    """The highest (``sign`` 1) or lowest passage of every answer along one column: its mean and
    its first token, ``[answers]``; NaN and 0 for an answer without tokens.
    """

    values: np.ndarray
    starts: np.ndarray

    @classmethod
    def find(cls, records: Sequence[TokenRecord], column: int, *, sign: int) -> Passages:
        """Find them with a running sum over each answer."""
        values = np.full(len(records), np.nan)
        starts = np.zeros(len(records), dtype=np.int64)
        for number, record in enumerate(records):
            along = record.values[:, column].astype(np.float64)
            width = min(PASSAGE, len(along))
            if width:
                sums = np.concatenate([[0.0], np.cumsum(along)])
                means = (sums[width:] - sums[:-width]) / width
                starts[number] = int(np.argmax(sign * means))
                values[number] = means[starts[number]]
        return cls(values=values, starts=starts)


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenView:
    """What the page's script draws: ``data`` of all answers, ``parts`` of those that it can open,
    and how many these are.
    """

    data: dict[str, Any]
    parts: tuple[Callable[[], object], ...]
    opened: int


def token_view(
    records: Sequence[TokenRecord], columns: Sequence[str], *, everything: bool
) -> TokenView:
    """Prepare the answers of one file. ``everything`` lets every answer be opened, whatever the
    size; otherwise at most ``TOKEN_BUDGET`` numbers, the most extreme answers first.
    """
    means = np.array([_mean(record.answer_values, len(columns)) for record in records])
    extremes = {
        end: [Passages.find(records, c, sign=sign) for c in range(len(columns))]
        for end, sign in _SIGNS.items()
    }
    chosen = range(len(records)) if everything else _within_budget(records, extremes)
    groups = [chosen[i : i + PER_PART] for i in range(0, len(chosen), PER_PART)]
    part = np.full(len(records), -1)
    for number, group in enumerate(groups):
        part[list(group)] = number
    scales = [_scale(records, c) for c in range(len(columns))]
    data = {
        "columns": [
            {
                "name": name,
                "digits": decimals([s["centre"] - s["reach"], s["centre"] + s["reach"]]),
                **s,
            }
            for name, s in zip(columns, scales, strict=True)
        ],
        "passage": PASSAGE,
        "line": [record.line for record in records],
        "turn": [record.turn for record in records],
        "tokens": [len(record.token_ids) for record in records],
        "question": [_snippet(record.question) for record in records],
        "part": part.tolist(),
        "mean": [_rounded(column) for column in means.T],
        **_reasoning(records, len(columns)),
        **{
            name: [{"value": _rounded(p.values), "start": p.starts.tolist()} for p in passages]
            for name, passages in extremes.items()
        },
        "top": [
            {end: _top(records, extremes[end][c], sign) for end, sign in _SIGNS.items()}
            for c in range(len(columns))
        ],
    }
    factors = [scale["factor"] for scale in scales]
    parts = tuple(
        partial(_part, [(number, records[number]) for number in group], factors) for group in groups
    )
    return TokenView(data=data, parts=parts, opened=len(chosen))


def _reasoning(records: Sequence[TokenRecord], columns: int) -> dict[str, Any]:
    """Return how many tokens of each answer are reasoning, and their mean by column."""
    if not any(record.think for record in records):
        return {}
    means = np.array([_mean(record.values[: record.think], columns) for record in records])
    return {
        "think": [record.think for record in records],
        "thinkMean": [_rounded(column) for column in means.T],
    }


def _mean(values: np.ndarray, columns: int) -> np.ndarray:
    if not len(values):
        return np.full(columns, np.nan)
    mean: np.ndarray = values.mean(axis=0, dtype=np.float64)
    return mean


def _within_budget(
    records: Sequence[TokenRecord], extremes: dict[str, list[Passages]]
) -> list[int]:
    """Return the answers that fit in one page: half of them the most extreme, half even spread."""
    sizes = [record.values.size for record in records]
    if sum(sizes) <= TOKEN_BUDGET:
        return list(range(len(records)))
    ranks = np.min(
        [
            np.argsort(np.argsort(np.nan_to_num(-sign * p.values, nan=np.inf)))
            for end, sign in _SIGNS.items()
            for p in extremes[end]
        ],
        axis=0,
    )
    chosen: set[int] = set()
    stride = max(1, round(2 * sum(sizes) / TOKEN_BUDGET))
    orders = (np.argsort(ranks, kind="stable").tolist(), range(0, len(records), stride))
    for order, budget in zip(orders, (TOKEN_BUDGET // 2, TOKEN_BUDGET), strict=True):
        used = sum(sizes[number] for number in chosen)
        for number in order:
            if number not in chosen and used + sizes[number] <= budget:
                chosen.add(number)
                used += sizes[number]
    return sorted(chosen)


def _scale(records: Sequence[TokenRecord], column: int) -> dict[str, float]:
    """Return where colours begin and end, and what stored numbers are multiplied by."""
    values = np.concatenate([np.zeros(0), *(record.values[:, column] for record in records)])
    if not len(values):
        return {"centre": 0.0, "reach": 1.0, "factor": 1.0}
    centre = float(np.median(values))  # single tokens, full stops above all, lie very far out
    reach = float(np.percentile(np.abs(values - centre), 90)) or 1.0
    factor = max(1.0, float(np.abs(values).max()) / 60_000)  # half precision ends at 65,504
    return {"centre": centre, "reach": reach, "factor": factor}


def _top(records: Sequence[TokenRecord], passages: Passages, sign: int) -> list[dict[str, Any]]:
    order = np.argsort(np.nan_to_num(-sign * passages.values, nan=np.inf), kind="stable")
    listed = [int(n) for n in order[:_LISTED] if np.isfinite(passages.values[n])]
    return [
        {
            "answer": number,
            "value": float(f"{passages.values[number]:.4g}"),
            "text": _passage_text(records[number], int(passages.starts[number])),
        }
        for number in listed
    ]


def _passage_text(record: TokenRecord, start: int) -> str:
    ends = np.cumsum(record.widths.astype(np.int64))
    first = int(ends[start - 1]) if start else 0
    last = int(ends[min(start + PASSAGE, len(ends)) - 1])
    return " ".join(record.text[first:last].split())


def _part(records: Sequence[tuple[int, TokenRecord]], factors: Sequence[float]) -> object:
    return {
        str(number): {
            "question": record.question,
            "text": record.text,
            "widths": _encoded(_utf16_widths(record).astype("<u2")),
            "values": _encoded((record.values / np.array(factors)).astype("<f2")),
        }
        for number, record in records
    }


def _utf16_widths(record: TokenRecord) -> np.ndarray:
    """Return the tokens' widths as JavaScript counts characters."""
    if record.text.isascii() or max(record.text, default="") <= "\uffff":
        return record.widths
    units = np.array([1 + (character > "\uffff") for character in record.text])
    ends = np.concatenate([[0], np.cumsum(record.widths.astype(np.int64))])
    counted = np.concatenate([[0], np.cumsum(units)])[ends]
    widths: np.ndarray = np.diff(counted)
    return widths


def _encoded(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _snippet(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SNIPPET else f"{line[: _SNIPPET - 1]}…"


def _rounded(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values]
