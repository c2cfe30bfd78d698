"""Projections of every token of many answers on disk: what ``pvec project --tokens`` leaves.

Part by part, two files each (docs/formats.md): ``part-00000.npz`` holds the numbers of all its
answers one after the other, ``part-00000.jsonl`` a line of text for each answer.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pvec.documents import misfit
from pvec.errors import StoreError
from pvec.runs.files import atomic_write
from pvec.runs.jsonl import encode_line, read_jsonl

_LINE = {"line": int, "turn": int, "tokens": int, "question": str, "text": str}


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenRecord:
    """One answer: where it is, the last thing that was asked, its text, and its tokens.

    ``token_ids`` is int32 ``[tokens]``; ``widths`` says how many characters of ``text`` each token
    is; ``values`` is float32 ``[tokens, columns]``. The first ``think`` tokens are reasoning.
    """

    line: int
    turn: int
    question: str
    text: str
    token_ids: np.ndarray
    widths: np.ndarray
    values: np.ndarray
    think: int = 0

    @property
    def answer_values(self) -> np.ndarray:
        """``values`` of the answer alone, without its reasoning."""
        return self.values[self.think :]


def write_tokens(
    folder: Path, number: int, records: Sequence[TokenRecord], *, columns: int
) -> None:
    """Write part ``number`` into ``folder``, both files as a whole."""
    name = folder / f"part-{number:05}"
    empty = np.zeros(0, dtype=np.int32)
    with atomic_write(name.with_suffix(".npz")) as stream:
        np.savez(
            stream,
            token_ids=np.concatenate([empty, *(r.token_ids for r in records)]).astype(np.int32),
            widths=np.concatenate([empty, *(r.widths for r in records)]).astype(np.uint16),
            values=np.concatenate(
                [np.zeros((0, columns)), *(r.values for r in records)], dtype=np.float32
            ),
        )
    with atomic_write(name.with_suffix(".jsonl")) as stream:
        for record in records:
            line = {
                "line": record.line,
                "turn": record.turn,
                "tokens": len(record.token_ids),
                "question": record.question,
                "text": record.text,
                **({"think": record.think} if record.think else {}),
            }
            stream.write(encode_line(line))


def read_tokens(folder: Path) -> Iterator[TokenRecord]:
    """Yield the answers in the order of the projected file, a part at a time.

    Raises ``StoreError`` for a part that is damaged or lacks one of its files.
    """
    for path in sorted(folder.glob("part-*.jsonl")):
        try:
            with np.load(path.with_suffix(".npz"), allow_pickle=False) as numbers:
                ids, widths, values = (numbers[k] for k in ("token_ids", "widths", "values"))
            start = 0
            for _, line in read_jsonl(path):
                if misfit(line, _LINE) is not None:
                    raise ValueError(path)
                stop = start + line["tokens"]
                yield TokenRecord(
                    line=line["line"],
                    turn=line["turn"],
                    question=line["question"],
                    text=line["text"],
                    token_ids=ids[start:stop],
                    widths=widths[start:stop],
                    values=values[start:stop],
                    think=int(line.get("think", 0)),
                )
                start = stop
            if not start == len(ids) == len(widths) == len(values):
                raise ValueError(path)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile):
            raise StoreError(
                f"{path} or the .npz file beside it is missing or damaged: project the file again "
                f"(--tokens --overwrite)."
            ) from None
