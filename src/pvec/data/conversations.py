"""A row of a file as a conversation, in whatever format it comes, and as token spans.

The one reader of chat formats: ``project``, ``screen`` and ``train`` understand the same rows. What
becomes of several turns, of a missing answer and of a row that is too long is decided here and
counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pvec.errors import InputError
from pvec.models.chat import (
    THINK_CLOSE,
    THINK_OPEN,
    encode_pairs,
    render_prompt,
    spans_from_ids,
    think_length,
)
from pvec.types import Message, SpanName, TokenSpans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = Literal["last", "all", "each"]
"""Which answers of a conversation count: the one it ends with, all pooled, or each by itself."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns that hold conversations. ``plain_prompts``: the prompts are questions,
    to be put through the chat template, and not rendered already.
    """

    prompt: str = "prompt"
    answer: str = "answer"
    messages: str = "messages"
    plain_prompts: bool = False


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation as messages. One that does not end with an answer is a prompt without one."""

    messages: Sequence[Message]

    @property
    def answered(self) -> bool:
        """Whether it ends with an answer."""
        return self.messages[-1]["role"] == "assistant"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A rendered prompt and its answer."""

    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Ids:
    """Prompt and answer as token ids; the answer's first ``skip`` tokens are thinking."""

    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]
    skip: int = 0


Conversation = Chat | Pair | Ids


@dataclass(kw_only=True)
class Counts:
    """How many rows there were, and how many of them need a word to the user.

    ``empty`` answers have no token to average over; ``unanswered`` conversations do not end with
    an answer; ``truncated`` rows lost the beginning of their prompt; ``cut_answers`` of these are
    longer than the context by themselves and lost their own beginning too; ``merged`` share a token
    between prompt and answer.
    """

    rows: int = 0
    answers: int = 0
    empty: int = 0
    unanswered: int = 0
    truncated: int = 0
    cut_answers: int = 0
    merged: int = 0

    def __add__(self, other: Counts) -> Counts:
        """Return the counts of both."""
        return Counts(**{k: v + getattr(other, k) for k, v in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class Spans:
    """The token spans of several conversations: ``rows[i]`` holds one per turn that counts."""

    rows: list[list[TokenSpans]]
    counts: Counts


@dataclass(frozen=True, kw_only=True)
class SpanMaker:
    """Turns conversations into spans.

    ``needed`` are the spans that will be averaged: without ``response`` the answers are left out
    of the computation. ``limit`` is the number of tokens the model reads (None: any).
    """

    tokenizer: PreTrainedTokenizerBase
    needed: Sequence[SpanName]
    turns: Turns = "last"
    thinking: bool = False
    limit: int | None = None

    def __call__(self, conversations: Sequence[Conversation]) -> Spans:
        """Return the spans of every conversation; ids are ``row:turn``."""
        counts = Counts(rows=len(conversations))
        rows: list[list[TokenSpans]] = [[] for _ in conversations]
        texts: list[tuple[str, str]] = []
        places: list[int] = []
        for row, conversation in enumerate(conversations):
            if isinstance(conversation, Ids):
                rows[row].append(self._spans(f"{row}:0", conversation, counts))
                continue
            if isinstance(conversation, Chat):
                counts.unanswered += not conversation.answered
            for text in self._texts(conversation):
                texts.append(text)
                places.append(row)
        encoded = encode_pairs(self.tokenizer, texts)
        for row, (prompt, answer), whole in zip(places, texts, encoded, strict=True):
            head = whole.token_ids[: whole.prompt_length]
            tail = whole.token_ids[whole.prompt_length :]
            skip = 0 if self.thinking else self._think_length(prompt, answer, head, tail)
            ids = Ids(prompt_ids=head, answer_ids=tail, skip=skip)
            counts.merged += whole.merged
            rows[row].append(self._spans(f"{row}:{len(rows[row])}", ids, counts))
        return Spans(rows=rows, counts=counts)

    def _texts(self, conversation: Chat | Pair) -> Iterator[tuple[str, str]]:
        """Yield the rendered prompt and the answer of every turn that counts."""
        if isinstance(conversation, Pair):
            yield conversation.prompt, conversation.answer
            return
        messages = conversation.messages
        places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self.turns == "last":
            places = places[-1:] if conversation.answered else []
        for place in places:
            yield self._render(messages[:place]), messages[place]["content"]
        if not places:
            yield self._render(messages), ""

    def _render(self, messages: Sequence[Message]) -> str:
        return render_prompt(self.tokenizer, messages, thinking=self.thinking)

    def _think_length(
        self, prompt: str, answer: str, head: Sequence[int], tail: Sequence[int]
    ) -> int:
        """Return how many tokens of the answer are thinking; most texts show at once: none."""
        opened = THINK_OPEN in answer or prompt[-32:].rstrip().endswith(THINK_OPEN)
        if not opened and THINK_CLOSE not in answer:
            return 0
        return think_length(self.tokenizer, tail, prompt_ids=head)

    def _spans(self, identity: str, ids: Ids, counts: Counts) -> TokenSpans:
        whole = spans_from_ids(
            identity, prompt_ids=ids.prompt_ids, answer_ids=ids.answer_ids, skip=ids.skip
        )
        start, stop = whole.spans["response"]
        counts.answers += 1
        counts.empty += start == stop
        stop = len(whole.token_ids)
        if "response" not in self.needed:
            stop = max(whole.spans["prompt"][1], 1)
        cut = max(stop - self.limit, 0) if self.limit is not None else 0
        counts.truncated += cut > 0
        counts.cut_answers += cut > whole.spans["prompt"][1]
        return TokenSpans(
            id=identity,
            token_ids=whole.token_ids[cut:stop],
            spans={name: _moved(whole.spans[name], cut, stop) for name in self.needed},
        )


def conversation_of(values: Mapping[str, Any], columns: Columns) -> Chat | Pair:
    """Return the conversation in a row's cells.

    Raises ``InputError`` with what is wrong with the row: the end of a sentence.
    """
    if columns.messages in values:
        return Chat(messages=_checked(values[columns.messages]))
    cells = []
    for name in (columns.prompt, columns.answer):
        cell = values.get(name)
        if cell is None:
            cell = ""  # no answer: kept, and counted as empty
        if not isinstance(cell, str):
            raise InputError(f"has no text as its {name!r}")
        cells.append(cell)
    prompt, answer = cells
    if not columns.plain_prompts:
        return Pair(prompt=prompt, answer=answer)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return Chat(messages=turns)


def _checked(messages: object) -> list[Message]:
    """Return chat messages. Raises ``InputError`` that says what is wrong with them."""
    if not isinstance(messages, list) or not messages:
        raise InputError("has no list of messages")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise InputError(f"has a message without text (the {number}. of {len(messages)})")
        if message.get("role") not in ("system", "user", "assistant"):
            raise InputError(
                f"has the role {message.get('role')!r}, which is not system, user or assistant"
            )
    return messages


def _moved(span: tuple[int, int], cut: int, stop: int) -> tuple[int, int]:
    """Return a span after ``cut`` tokens went from the front and those from ``stop`` on."""
    first, last = span
    return max(min(first, stop) - cut, 0), max(min(last, stop) - cut, 0)
