"""From conversations to the token rows that are trained on, with every row accounted for."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pvec.data.conversations import Chat, Columns, conversation_of
from pvec.data.table import BadRow, Row, read_rows
from pvec.data.tables import open_table
from pvec.errors import InputError
from pvec.training.config import DataPart
from pvec.training.masks import TokenizedRow, tokenize_conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnRow = Callable[[int, int], None]
"""Told how many rows are tokenised, of how many."""

_SHOWN = 20
"""Faults that a message lists; the rest is counted."""


Place = str
"""Where a row stands: ``file:line``."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Token rows, and what happened to those that were too long."""

    rows: tuple[TokenizedRow, ...]
    truncated: int = 0
    dropped: int = 0
    """Rows left out: too long, or without a loss token before the limit."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row.token_ids) for row in self.rows]

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(self.lengths)

    @property
    def loss_tokens(self) -> int:
        """Tokens that carry loss."""
        return sum(row.loss_tokens for row in self.rows)


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
    on_row: OnRow = lambda _done, _total: None,
) -> TrainingData:
    """Read, check, split and tokenise the data. No weights are needed.

    ``context`` is the most tokens that the model reads. Raises ``InputError`` for everything that
    is wrong with the rows at once, and when no loss token is left.
    """
    limit = min(part.max_tokens, context or part.max_tokens)
    bad: list[str] = []
    chats = read_chats(part.train, skip_bad=part.skip_bad, bad=bad)
    held = read_chats(part.eval, skip_bad=part.skip_bad, bad=bad) if part.eval else []
    if part.eval_fraction:
        chats, held = _split(chats, part.eval_fraction, seed=seed)
    total = len(chats) + len(held)

    def tokenized(chats: Sequence[tuple[Place, Chat]], before: int) -> Rows:
        def tick(number: int) -> None:
            on_row(before + number, total)

        return _tokenized(chats, part, tokenizer, limit=limit, tick=tick, bad=bad)

    train, held_out = tokenized(chats, 0), tokenized(held, len(chats))
    if not train.rows:
        raise InputError(
            f"No training row has anything to learn within {limit} tokens: raise data.max_tokens."
        )
    notes = (*_notes(train, "training", limit), *_notes(held_out, "held-out", limit))
    if bad:
        notes = (f"{len(bad):,} rows cannot be used and are left out, the first: {bad[0]}", *notes)
    return TrainingData(train=train, held_out=held_out, notes=notes)


def read_chats(
    sources: Sequence[str], *, skip_bad: bool = False, bad: list[str] | None = None
) -> list[tuple[Place, Chat]]:
    """Read every conversation of ``sources``: files or data sets as ``open_table`` takes them.

    With ``skip_bad`` rows that cannot be used are left out and described in ``bad``; else raises
    ``InputError`` naming file and line of *every* row that is empty, malformed or without an
    assistant turn. Raises it for a source that cannot be read or holds nothing.
    """
    chats: list[tuple[Place, Chat]] = []
    problems: list[str] = []
    faults: list[str] = []
    for source in sources:
        try:
            table = open_table(source)
        except InputError as error:
            problems.append(str(error))
            continue
        for item in read_rows(table, _chat):
            if isinstance(item, BadRow):
                faults.append(f"{source}:{item.line} {item.reason}")
            else:
                row, chat = item
                chats.append((f"{source}:{row.line}", chat))
    if skip_bad:
        (bad if bad is not None else []).extend(faults)
    elif faults:
        problems.append(_sentence(faults))
    if problems:
        raise InputError(" ".join(problems))
    return chats


def _sentence(faults: Sequence[str]) -> str:
    examples = "; ".join(faults[:_SHOWN])
    more = f"; and {len(faults) - _SHOWN:,} more" if len(faults) > _SHOWN else ""
    rows_are = "row is" if len(faults) == 1 else "rows are"
    return (
        f"{len(faults):,} training {rows_are} wrong: {examples}{more}. Correct them, or leave them "
        f"out with data.skip_bad=true."
    )


def _chat(row: Row) -> Chat:
    """Return a row's conversation. Raises ``InputError``, the end of a sentence, for a bad one."""
    chat = conversation_of(row.values, Columns())
    if not isinstance(chat, Chat):
        raise InputError("has a prompt and its answer as text: write them as a list of messages")
    answers = [
        chat.messages[place]["content"]
        for place in chat.answer_places
        if place not in chat.without_loss
    ]
    if not answers:
        raise InputError("has no assistant turn" + (" to learn" if chat.without_loss else ""))
    if not all(answer.strip() for answer in answers):
        raise InputError("has an empty assistant turn")
    return chat


def _tokenized(
    chats: Iterable[tuple[Place, Chat]],
    part: DataPart,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int,
    tick: Callable[[int], None],
    bad: list[str],
) -> Rows:
    """Return the conversations as tokens.

    What the template refuses is a fault, or left out; rows over the limit are truncated, dropped or
    refused, as the configuration says.
    """
    useful: list[TokenizedRow] = []
    faults: list[str] = []
    long: list[Place] = []
    tokenized = truncated = 0
    for number, (where, chat) in enumerate(chats, start=1):
        if number % 100 == 0:
            tick(number)
        try:
            row = tokenize_conversation(
                tokenizer,
                chat.messages,
                loss_on_all=part.loss_on == "all",
                without_loss=chat.without_loss,
            )
        except InputError as error:
            faults.append(f"{where} is refused: {error}".removesuffix("."))
            continue
        tokenized += 1
        over = len(row.token_ids) > limit
        if over:
            long.append(where)
        short = row.truncated(limit)
        if short.loss_tokens and not (over and part.too_long == "drop"):
            useful.append(short)
            truncated += over
    if part.skip_bad:
        bad.extend(faults)
    elif faults:
        raise InputError(_sentence(faults))
    if long and part.too_long == "refuse":
        more = f" and {len(long) - 10:,} more" if len(long) > 10 else ""
        raise InputError(
            f"{len(long):,} rows are longer than {limit} tokens ({', '.join(long[:10])}{more}): "
            f"shorten them, raise data.max_tokens, or set data.too_long to cut or drop."
        )
    return Rows(rows=tuple(useful), truncated=truncated, dropped=tokenized - len(useful))


def _split(
    chats: list[tuple[Place, Chat]], fraction: float, *, seed: int
) -> tuple[list[tuple[Place, Chat]], list[tuple[Place, Chat]]]:
    """Hold out a random share of the rows, at least one; the order of the others stays."""
    count = max(1, round(len(chats) * fraction))
    if count >= len(chats):
        raise InputError(
            f"Holding out {fraction:g} of {len(chats)} rows leaves nothing to train on: give more "
            f"rows or a smaller data.eval_fraction."
        )
    chosen = set(random.Random(f"pvec-held-out-{seed}").sample(range(len(chats)), count))  # noqa: S311
    return (
        [chat for i, chat in enumerate(chats) if i not in chosen],
        [chat for i, chat in enumerate(chats) if i in chosen],
    )


def _notes(rows: Rows, name: str, limit: int) -> list[str]:
    notes = []
    if rows.truncated:
        notes.append(
            f"{rows.truncated:,} {name} rows were longer than {limit} tokens: their end is cut"
        )
    if rows.dropped:
        notes.append(
            f"{rows.dropped:,} {name} rows were left out (too long, or nothing to learn within "
            f"{limit} tokens)"
        )
    return notes
