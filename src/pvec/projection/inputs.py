"""What projecting commands read: conversations in tables, data set folders and run folders.

Whatever it is, it is read row by row, and written back with further columns by its own writer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from pvec.backends.planned import PlannedResponse, PromptCache, derive_seed
from pvec.backends.run_session import RunSession, run_identity
from pvec.backends.session import ModelSession
from pvec.data.conversations import (
    Chat,
    Columns,
    Conversation,
    Ids,
    Pair,
    conversation_of,
    has_conversations,
)
from pvec.data.csv_table import CsvRowWriter
from pvec.data.json_table import JsonlTable
from pvec.data.judged_csv import defuses_csv
from pvec.data.spans import TemplateCheck
from pvec.data.table import (
    BadRow,
    Row,
    Table,
    TableWriter,
    check_rows,
    read_rows,
    require_columns,
)
from pvec.data.tables import open_table
from pvec.errors import InputError, StoreError
from pvec.models.chat import encode_prompt
from pvec.runs.manifest import FILE_NAME
from pvec.runs.names import run_name
from pvec.runs.responses import Json, ResponseRecord
from pvec.runs.store import Run
from pvec.settings.commands import ProjectSettings
from pvec.traits.trait import Trait

_RUN_COLUMNS = ("id", "trait", "question_id", "question", "system", "prompt", "answer")


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """Rows of a table with the conversations in them."""

    table: Table
    conversation: Callable[[Row], Conversation]
    """Returns a row's conversation; raises ``InputError`` that says what is wrong with the row."""

    @property
    def path(self) -> Path:
        """Where the rows are."""
        return self.table.path

    def read(self) -> Iterator[tuple[Row, Conversation] | BadRow]:
        """Yield every row with its conversation; one that holds none is a bad row."""
        return read_rows(self.table, self.conversation)

    def checked(self, check: Callable[[Conversation], None]) -> Source:
        """Return the same rows, of which those that ``check`` refuses (``InputError``) are bad."""

        def conversation(row: Row) -> Conversation:
            read = self.conversation(row)
            check(read)
            return read

        return replace(self, conversation=conversation)

    def rows(self) -> Iterator[tuple[Row, Conversation]]:
        """Yield the good rows."""
        return (row for row in self.read() if not isinstance(row, BadRow))

    def check(
        self,
        *,
        skip_bad: bool,
        on_row: Callable[[tuple[Row, Conversation]], None] | None = None,
    ) -> tuple[int, list[BadRow]]:
        """Return how many good rows there are, and the bad ones where they may be left out.

        ``on_row`` is given every good row. Raises ``InputError`` that counts the bad rows and lists
        the first, and for an input without rows.
        """
        good, bad = check_rows(self.path, self.read(), skip_bad=skip_bad, on_row=on_row)
        if not good:
            raise InputError(f"{self.path} has no rows to project.")
        return good, bad


class RunTable(Table):
    """A run's answers; what is written of them is a CSV in the run's folder."""

    def __init__(self, path: Path) -> None:
        self.run = Run.read(path)
        first = next(self.run.responses(), None)
        if first is None:
            raise InputError(f"{path} has no answers yet: run the command that made it again.")
        super().__init__(
            path, columns=(*_RUN_COLUMNS, *(f"condition.{name}" for name in first.condition))
        )

    @property
    def output(self) -> Path:
        """``projected.csv`` in the run's folder."""
        return self.path / "projected.csv"

    @property
    def replaceable(self) -> bool:
        """A folder is not."""
        return False

    def stamp(self) -> list[str | int]:
        """Return place, size and time of the answers."""
        answers = self.path / "responses.jsonl"
        status = answers.stat()
        return [str(answers.resolve()), status.st_size, status.st_mtime_ns]

    def read(self) -> Iterator[Row | BadRow]:
        """Yield every answer; ``raw`` is its record."""
        for number, record in enumerate(self.run.responses()):
            values = {name: getattr(record, name) for name in _RUN_COLUMNS}
            values |= {f"condition.{name}": value for name, value in record.condition.items()}
            yield Row(number=number, line=number + 1, values=values, raw=record)

    def writer(self, stream: IO[bytes], *, columns: Sequence[str]) -> TableWriter:
        """Return a writer of the answers with the scores of the run's judge, if it is one."""
        scores = self.run.scores_by_response() if len(self.run.judges()) == 1 else {}
        metrics = tuple(dict.fromkeys(metric for row in scores.values() for metric in row))

        def cells(row: Row) -> Mapping[str, Any]:
            own = scores.get(row.raw.id, {})
            return {**row.values, **{m: own[m].score for m in metrics if m in own}}

        return CsvRowWriter(
            stream, (*self.columns, *metrics), columns, cells, exact=not defuses_csv(self.path)
        )


def open_source(path: Path, settings: ProjectSettings) -> Source:
    """Open whatever ``path`` is. Raises ``InputError`` for what pvec does not read."""
    if (path / FILE_NAME).is_file():
        return Source(table=RunTable(path), conversation=_recorded)
    table, columns = open_table(path), columns_of(settings)
    if not isinstance(table, JsonlTable) and not has_conversations(table.columns, columns):
        require_columns(path, columns=table.columns, need=(columns.prompt, columns.answer))
    return Source(table=table, conversation=conversation_reader(settings))


def conversation_reader(settings: ProjectSettings) -> Callable[[Row], Conversation]:
    """Return what reads the conversation in a row of a user's table."""
    columns = columns_of(settings)
    return lambda row: conversation_of(row.values, columns)


def columns_of(settings: ProjectSettings) -> Columns:
    """Return where the settings say that conversations are."""
    return Columns(
        prompt=settings.prompt_column,
        answer=settings.answer_column,
        messages=settings.messages_column,
        plain_prompts=settings.plain_prompts,
    )


def _recorded(row: Row) -> Ids:
    record: ResponseRecord = row.raw
    return Ids(prompt_ids=record.prompt_ids, answer_ids=record.token_ids, skip=record.think_tokens)


# ── samples by their prompts: what screening, monitoring and shifts need of an input ────────────


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """A distinct prompt: a key made of its text, its tokens, its system prompt and question."""

    key: str
    text: str
    ids: tuple[int, ...]
    system: str | None
    question: str

    def planned(
        self,
        session: ModelSession,
        *,
        seed: Sequence[str | int],
        condition: Mapping[str, Json],
        trait: str = "",
        system: str | None = None,
    ) -> PlannedResponse:
        """Return an answer to this prompt that a run should hold; ``seed`` is its place there."""
        return PlannedResponse(
            trait=trait,
            condition=condition,
            question=self.question,
            question_id=self.key,
            system=system,
            prompt=self.text,
            prompt_ids=self.ids,
            sampling=session.sampling(derive_seed(session.settings.generation.seed, *seed)),
            engine=session.identity,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """The samples of a file, in its order: the key of each one's prompt, its line, and whether it
    has an answer; ``distinct`` are the prompts by key. Answers are read again when needed.
    """

    source: Source
    prompts: tuple[str, ...]
    lines: tuple[int, ...]
    answered: tuple[bool, ...]
    distinct: dict[str, Prompt]

    def conversations(self) -> Iterator[Conversation]:
        """Yield the samples' conversations."""
        return (conversation for _, conversation in self.source.rows())


def open_samples(source: Source, session: ModelSession, *, skip_bad: bool) -> Samples:
    """Read the prompts of ``source``, and note how many rows are left out with ``skip_bad``.

    Raises ``InputError`` for rows that cannot be read.
    """
    source = source.checked(TemplateCheck(session.metadata.tokenizer))
    cache = PromptCache(session)
    keys, lines, answered = [], [], []
    distinct: dict[str, Prompt] = {}

    def add(item: tuple[Row, Conversation]) -> None:
        row, conversation = item
        try:
            prompt = prompt_of(conversation, session, cache)
        except InputError as error:
            raise InputError(f"{source.path}:{row.line} is refused: {error}") from error
        keys.append(prompt.key)
        lines.append(row.line)
        answered.append(len(_answer(conversation)) > 0)
        distinct.setdefault(prompt.key, prompt)

    _, bad = source.check(skip_bad=skip_bad, on_row=add)
    if bad:
        session.notify(
            f"{source.path}: {len(bad)} rows left out that cannot be used, the first: "
            f"line {bad[0].line} {bad[0].reason}"
        )
    return Samples(
        source=source,
        prompts=tuple(keys),
        lines=tuple(lines),
        answered=tuple(answered),
        distinct=distinct,
    )


def prompt_of(conversation: Conversation, session: ModelSession, cache: PromptCache) -> Prompt:
    """Return the prompt that a conversation's last answer was given to."""
    system = None
    if isinstance(conversation, Ids):
        ids = tuple(conversation.prompt_ids)
        text = question = str(session.metadata.tokenizer.decode(list(ids)))
    elif isinstance(conversation, Pair):
        text = question = conversation.prompt
        ids = encode_prompt(session.metadata.tokenizer, text)
    else:
        turns = conversation.messages[: -1 if conversation.answered else None]
        text, ids = cache(turns)
        question = turns[-1]["content"] if turns else text
        system = next((m["content"] for m in turns if m["role"] == "system"), None)
    key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:20]
    return Prompt(key=key, text=text, ids=ids, system=system, question=question)


def answer_text(conversation: Conversation, session: ModelSession) -> str:
    """Return a conversation's last answer as text."""
    answer = _answer(conversation)
    if isinstance(answer, str):
        return answer
    return str(session.metadata.tokenizer.decode(list(answer)))


def _answer(conversation: Conversation) -> str | Sequence[int]:
    if isinstance(conversation, Chat):
        return conversation.messages[-1]["content"] if conversation.answered else ""
    return conversation.answer if isinstance(conversation, Pair) else conversation.answer_ids


# ── the run folders of screening and monitoring a file, and of a shift from a base model ────────


def study_identity(session: ModelSession, path: Path) -> dict[str, Json]:
    """Return what tells the run of a command on the file ``path`` from another."""
    return run_identity(session, subject={"trait": path.resolve().stem})


def study_folder(session: ModelSession, command: str, *, path: Path, out: Path | None) -> Path:
    """Return the run folder of a command on the file ``path``."""
    settings, adapter = session.settings, session.metadata.adapter
    name = run_name(command, path.resolve().stem, model=settings.model.id, adapter=adapter)
    return out or settings.paths.runs / name


def open_run(
    session: ModelSession,
    folder: Path,
    *,
    kind: str,
    identity: Mapping[str, Json],
    traits: Sequence[Trait] = (),
) -> RunSession:
    """Open the run in ``folder`` or begin it. Raises ``StoreError`` for one of another identity."""
    try:
        return RunSession(session, folder, kind=kind, identity=identity, traits=traits)
    except StoreError as error:
        raise StoreError(f"{error} (--out names the folder)") from error
