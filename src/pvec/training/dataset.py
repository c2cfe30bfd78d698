"""From conversations to the token rows that are trained on, with every row accounted for."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pvec.errors import InputError
from pvec.training.config import DataPart
from pvec.training.masks import Labelled, label_conversation
from pvec.training.rows import Row, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnRow = Callable[[int, int], None]
"""Told how many rows are tokenised, of how many."""


def nobody(*_: object) -> None:
    """Tell nobody."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Token rows, and what happened to those that were too long."""

    rows: tuple[Labelled, ...]
    cut: int = 0
    dropped: int = 0
    """Rows left out: too long, or nothing to learn before the limit."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row.token_ids) for row in self.rows]

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(self.lengths)

    @property
    def learnt(self) -> int:
        """Tokens that carry loss."""
        return sum(row.learnt for row in self.rows)


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What is trained on, and what is held out (empty when nothing is)."""

    train: Rows
    held_out: Rows
    notes: tuple[str, ...] = ()


def prepare_data(
    part: DataPart,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    context: int | None = None,
    on_row: OnRow = nobody,
) -> TrainingData:
    """Read, check, split and tokenise the data. No weights are needed.

    ``context`` is the most tokens that the model reads. Raises ``InputError`` for everything that
    is wrong with the rows at once, and when nothing is left to learn.
    """
    limit = min(part.max_tokens, context or part.max_tokens)
    rows = read_rows(part.train)
    held: list[Row] = read_rows(part.eval) if part.eval else []
    if part.eval_fraction:
        rows, held = _split(rows, part.eval_fraction, seed=seed)
    total = len(rows) + len(held)

    def tokenised(some: Sequence[Row], done: int) -> Rows:
        labelled = _labelled(some, part, tokenizer, tick=lambda k: on_row(done + k, total))
        return _within(labelled, some, part, limit=limit)

    train, held_out = tokenised(rows, 0), tokenised(held, len(rows))
    if not train.rows:
        raise InputError(
            f"No training row has anything to learn within {limit} tokens: raise data.max_tokens."
        )
    return TrainingData(
        train=train,
        held_out=held_out,
        notes=(*_notes(train, "training", limit), *_notes(held_out, "held-out", limit)),
    )


def _labelled(
    rows: Iterable[Row],
    part: DataPart,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tick: Callable[[int], None],
) -> list[Labelled]:
    labelled = []
    for number, row in enumerate(rows, start=1):
        try:
            labelled.append(
                label_conversation(tokenizer, row.messages, loss_on_all=part.loss_on == "all")
            )
        except InputError as error:
            raise InputError(f"{row.where}: {error}") from None
        if number % 100 == 0:
            tick(number)
    return labelled


def _within(
    labelled: Sequence[Labelled], rows: Sequence[Row], part: DataPart, *, limit: int
) -> Rows:
    """Do with rows over the limit what was asked."""
    long = [row.where for row, one in zip(rows, labelled, strict=True) if _over(one, limit)]
    if long and part.too_long == "refuse":
        shown = ", ".join(long[:10]) + (f" and {len(long) - 10:,} more" if len(long) > 10 else "")
        raise InputError(
            f"{len(long):,} rows are longer than {limit} tokens ({shown}): shorten them, raise "
            f"data.max_tokens, or set data.too_long to cut or drop."
        )
    kept = [one for one in labelled if part.too_long == "cut" or not _over(one, limit)]
    shortened = [one.cut(limit) for one in kept]
    useful = tuple(one for one in shortened if one.learnt)
    cut = sum(
        _over(one, limit) and short.learnt > 0 for one, short in zip(kept, shortened, strict=True)
    )
    return Rows(rows=useful, cut=cut, dropped=len(labelled) - len(useful))


def _over(row: Labelled, limit: int) -> bool:
    return len(row.token_ids) > limit


def _split(rows: list[Row], fraction: float, *, seed: int) -> tuple[list[Row], list[Row]]:
    """Hold out a random share of the rows, at least one; the order of the others stays."""
    count = max(1, round(len(rows) * fraction))
    if count >= len(rows):
        raise InputError(
            f"Holding out {fraction:g} of {len(rows)} rows leaves nothing to train on: give more "
            f"rows or a smaller data.eval_fraction."
        )
    chosen = set(random.Random(f"pvec-held-out-{seed}").sample(range(len(rows)), count))  # noqa: S311
    return (
        [row for i, row in enumerate(rows) if i not in chosen],
        [row for i, row in enumerate(rows) if i in chosen],
    )


def _notes(rows: Rows, name: str, limit: int) -> list[str]:
    notes = []
    if rows.cut:
        notes.append(f"{rows.cut:,} {name} rows were longer than {limit} tokens: their end is cut")
    if rows.dropped:
        notes.append(
            f"{rows.dropped:,} {name} rows were left out (too long, or nothing to learn within "
            f"{limit} tokens)"
        )
    return notes
