"""What ``pvec project`` reads: tables, data set folders and run folders, as conversations.

Whatever it is, it is read row by row, and written back with further columns by its own writer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pvec.data.conversations import Chat, Conversation, Ids, Pair, problem_of
from pvec.data.csv_table import encode_row
from pvec.data.tables import BadRow, Row, Table, TableWriter, open_table, require_columns
from pvec.errors import InputError
from pvec.runs.manifest import FILE_NAME
from pvec.runs.store import Run
from pvec.settings.tree import ProjectSettings

_LISTED = 5
_RUN_COLUMNS = ("id", "trait", "question_id", "question", "system", "prompt", "answer")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row with the conversation in it."""

    row: Row
    conversation: Conversation


class Source(ABC):
    """Rows to project. ``path`` is where they are, ``columns`` what they have."""

    path: Path
    columns: tuple[str, ...]

    @abstractmethod
    def read(self) -> Iterator[Entry | BadRow]:
        """Yield every row in its order, bad ones included."""

    @abstractmethod
    def writer(self, stream: IO[bytes], *, columns: Sequence[str]) -> TableWriter:
        """Return a writer of these rows with ``columns`` added or replaced."""

    @property
    @abstractmethod
    def output(self) -> Path:
        """Where results go unless told otherwise: beside the input."""

    @property
    def replaceable(self) -> bool:
        """Whether the input is one file that a new one can take the place of."""
        return False

    def entries(self) -> Iterator[Entry]:
        """Yield the good rows."""
        return (one for one in self.read() if isinstance(one, Entry))

    def scan(self, on_row: Callable[[int], None]) -> tuple[int, list[BadRow]]:
        """Read everything once: how many good rows there are, and the bad ones."""
        good, bad = 0, []
        for one in self.read():
            if isinstance(one, Entry):
                good += 1
                on_row(good)
            else:
                bad.append(one)
        return good, bad

    def stamp(self) -> tuple[str, int, int]:
        """Return what tells this input from a changed one: its path, size and time."""
        path = self.path if self.path.is_file() else self._main_file()
        found = path.stat()
        return str(path.resolve()), found.st_size, found.st_mtime_ns

    def _main_file(self) -> Path:
        return self.path


class TableSource(Source):
    """A CSV, JSON lines or Parquet file, or a data set folder."""

    def __init__(self, path: Path, table: Table, settings: ProjectSettings) -> None:
        self.path = path
        self.columns = table.columns
        self._table = table
        self._settings = settings
        self._chats = settings.messages_column in table.columns
        if not self._chats:
            need = [settings.prompt_column, settings.answer_column]
            if not set(need) & set(table.columns) and path.suffix in (".jsonl", ".ndjson"):
                need = [settings.messages_column]
            require_columns(path, columns=table.columns, need=need)

    @property
    def output(self) -> Path:
        """``data.projected.csv`` beside ``data.csv``; a folder's results are one Parquet file."""
        suffix = self.path.suffix if self.path.is_file() else ".parquet"
        stem = self.path.stem if self.path.is_file() else self.path.resolve().name
        return self.path.with_name(f"{stem}.projected{suffix}")

    @property
    def replaceable(self) -> bool:
        """A file is, a folder is not."""
        return self.path.is_file()

    def read(self) -> Iterator[Entry | BadRow]:
        """Yield every row; one that holds no conversation is a bad one."""
        for row in self._table.read():
            if isinstance(row, BadRow):
                yield row
                continue
            found = self.conversation(row.values)
            if isinstance(found, str):
                yield BadRow(line=row.line, reason=found)
            else:
                yield Entry(row=row, conversation=found)

    def conversation(self, values: Mapping[str, Any]) -> Conversation | str:
        """Return the conversation in a row's cells, or what is wrong with it."""
        return conversation_of(values, self._settings, chats=self._chats)

    def writer(self, stream: IO[bytes], *, columns: Sequence[str]) -> TableWriter:
        """Return the table's own writer: what is not added stays byte for byte."""
        return self._table.writer(stream, columns=columns)

    def _main_file(self) -> Path:
        return self.path / "state.json"


class RunSource(Source):
    """A run's answers, by the token ids that were generated; results are a CSV in its folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run = Run.read(path)
        first = next(self.run.responses(), None)
        if first is None:
            raise InputError(f"{path} has no answers yet: run the command that made it again.")
        self._conditions = tuple(first.condition)
        self._scores: Mapping[str, Mapping[str, Any]] = {}
        self._metrics: tuple[str, ...] = ()
        self.columns = (*_RUN_COLUMNS, *(f"condition.{name}" for name in self._conditions))

    @property
    def output(self) -> Path:
        """``projected.csv`` in the run's folder."""
        return self.path / "projected.csv"

    def read(self) -> Iterator[Entry | BadRow]:
        """Yield every answer."""
        for number, record in enumerate(self.run.responses()):
            condition = {f"condition.{k}": v for k, v in record.condition.items()}
            values = {**{name: getattr(record, name) for name in _RUN_COLUMNS}, **condition}
            ids = Ids(
                prompt_ids=record.prompt_ids,
                answer_ids=record.token_ids,
                skip=record.think_tokens,
            )
            row = Row(number=number, line=number + 1, values=values, raw=record.id)
            yield Entry(row=row, conversation=ids)

    def writer(self, stream: IO[bytes], *, columns: Sequence[str]) -> TableWriter:
        """Return a writer of the answers with the scores of the run's judge, if it is one."""
        if len(self.run.judges()) == 1:
            self._scores = self.run.scores_by_response()
        found = (metric for scores in self._scores.values() for metric in scores)
        return _RunWriter(stream, self.columns, tuple(dict.fromkeys(found)), self._scores, columns)

    def _main_file(self) -> Path:
        return self.path / "responses.jsonl"


class _RunWriter(TableWriter):
    def __init__(
        self,
        stream: IO[bytes],
        own: Sequence[str],
        metrics: Sequence[str],
        scores: Mapping[str, Mapping[str, Any]],
        columns: Sequence[str],
    ) -> None:
        self._stream = stream
        self._own = own
        self._metrics = metrics
        self._scores = scores
        self._columns = columns
        stream.write(encode_row([*own, *metrics, *columns]) + b"\n")

    def write(self, row: Row, values: Mapping[str, float | int | str | None]) -> None:
        scores = self._scores.get(row.raw, {})
        cells = [
            *(row.values.get(name) for name in self._own),
            *(scores[name].score if name in scores else None for name in self._metrics),
            *(values[name] for name in self._columns),
        ]
        self._stream.write(encode_row(["" if c is None else str(c) for c in cells]) + b"\n")


def conversation_of(
    values: Mapping[str, Any], settings: ProjectSettings, *, chats: bool
) -> Conversation | str:
    """Return the conversation in a row's cells, or what is wrong with it, the end of a sentence."""
    if chats:
        messages = values.get(settings.messages_column)
        return problem_of(messages) or Chat(messages=messages)  # type: ignore[arg-type]
    cells = []
    for name in (settings.prompt_column, settings.answer_column):
        cell = values.get(name)
        if cell is None:
            cell = ""  # no answer: kept, and counted as empty
        if not isinstance(cell, str):
            return f"has no text as its {name!r}"
        cells.append(cell)
    prompt, answer = cells
    if not settings.plain_prompts:
        return Pair(prompt=prompt, answer=answer)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return Chat(messages=turns)


def open_source(path: Path, settings: ProjectSettings) -> Source:
    """Open whatever ``path`` is. Raises ``InputError`` for what pvec does not read."""
    if not path.is_dir():
        return TableSource(path, open_table(path), settings)
    if (path / FILE_NAME).is_file():
        return RunSource(path)
    from pvec.data.dataset_table import DatasetTable

    return TableSource(path, DatasetTable(path), settings)


def count_rows(
    source: Source, *, skip_bad: bool, on_row: Callable[[int], None]
) -> tuple[int, list[BadRow]]:
    """Return how many good rows there are, and the bad ones where they may be left out.

    Raises ``InputError`` that counts the bad rows and lists the first, and for an input without
    rows.
    """
    good, bad = source.scan(on_row)
    if bad and not skip_bad:
        listed = "; ".join(f"{source.path}:{row.line} {row.reason}" for row in bad[:_LISTED])
        more = f"; and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
        raise InputError(
            f"{len(bad)} of {good + len(bad)} rows cannot be used: {listed}{more}. "
            "Correct them, or leave them out with --skip-bad."
        )
    if not good:
        raise InputError(f"{source.path} has no rows to project.")
    return good, bad


def is_same_file(one: Path, two: Path) -> bool:
    """Whether two paths are one file, links followed."""
    with suppress(OSError):
        return one.samefile(two)
    return False
