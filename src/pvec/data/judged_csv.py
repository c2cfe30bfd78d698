"""Judged answers as CSV in the reference's columns, written and read.

``question, prompt, answer, question_id, {trait}, coherence``; a missing score is an empty cell.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pvec.data.csv_table import CsvTable, restored, write_csv
from pvec.data.table import require_file
from pvec.errors import InputError
from pvec.runs.manifest import FILE_NAME, read_manifest

_COLUMNS = ("question", "prompt", "answer", "question_id")
_COHERENCE = "coherence"


@dataclass(frozen=True, kw_only=True)
class JudgedAnswer:
    """One answer with its scores, 0 to 100 or None where the judge gave none.

    ``prompt`` is the rendered chat template up to where the answer begins.
    """

    question: str
    prompt: str
    answer: str
    question_id: str
    trait_score: float | None
    coherence: float | None


def write_judged_csv(path: str | Path, answers: Iterable[JudgedAnswer], *, trait: str) -> int:
    """Write ``answers`` to ``path``, replacing it as a whole, and return how many there were.

    In a run, texts that a spreadsheet would execute get an apostrophe in front, unless its settings
    say ``paths.exact_csv``; ``read_judged_csv`` removes it again. Elsewhere texts stay as they are.
    Raises ``StoreError`` when it cannot be written.
    """
    rows = (
        (a.question, a.prompt, a.answer, a.question_id, _float(a.trait_score), _float(a.coherence))
        for a in answers
    )
    return write_csv(
        path, (*_COLUMNS, trait, _COHERENCE), rows, exact=not defuses_csv(Path(path).parent)
    )


def read_judged_csv(path: str | Path, *, trait: str) -> Iterator[JudgedAnswer]:
    """Yield the answers of a CSV with the reference's columns, one at a time.

    ``prompt``, ``answer``, the trait's column and ``coherence`` must be there; ``question`` and
    ``question_id`` may be missing. Raises ``InputError`` for missing columns (which, what was
    found), and for a score that is no number from 0 to 100 (file and line).
    """
    require_file(Path(path))
    table = CsvTable(Path(path), need=("prompt", "answer", trait, _COHERENCE))
    return _judged_rows(table, trait)


def _judged_rows(table: CsvTable, trait: str) -> Iterator[JudgedAnswer]:
    text = restored if defuses_csv(table.path.parent) else str
    for row in table.rows():
        where = f"{table.path}:{row.line}"
        yield JudgedAnswer(
            question=text(row.values.get("question", "")),
            prompt=text(row.values["prompt"]),
            answer=text(row.values["answer"]),
            question_id=text(row.values.get("question_id", "")),
            trait_score=_score(row.values[trait], where=where, column=trait),
            coherence=_score(row.values[_COHERENCE], where=where, column=_COHERENCE),
        )


def defuses_csv(folder: Path) -> bool:
    """Whether ``folder`` is a run whose tables have an apostrophe before what a spreadsheet would
    execute: a run of version 0.1 does not say so and has none.
    """
    if not (folder / FILE_NAME).is_file():
        return False
    paths = read_manifest(folder).get("settings", {}).get("paths", {})
    return paths.get("exact_csv") is False


def _float(score: float | None) -> float | None:
    return None if score is None else float(score)


def _score(cell: str, *, where: str, column: str) -> float | None:
    """Return a score, or None for the ways in which tables say that there is none."""
    text = cell.strip()
    if text.lower() in {"", "nan", "none", "null", "na"}:
        return None
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not 0 <= score <= 100:
        raise InputError(
            f"{where} has {cell!r} as the score {column!r}; a score is a number from 0 to 100, or "
            "empty where there is none."
        )
    return score
