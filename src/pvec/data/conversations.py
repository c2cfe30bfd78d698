"""A row to be projected, in whatever form it comes, as token spans.

A conversation is chat messages, a rendered prompt with its answer, or token ids. What becomes of
several turns, of a missing answer and of a row that is too long is decided here and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

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
class Chat:
    """A conversation as messages. One that does not end with an answer is a prompt without one."""

    messages: Sequence[Message]


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


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What was not plain about some rows.

    ``empty`` answers have no token to average over; ``unanswered`` conversations do not end with
    an answer; ``truncated`` lost the beginning of their prompt; ``cut_answers`` of these are longer
    than the context by themselves and lost their own beginning too; ``merged`` share a token
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
        texts = [
            (row, pair)
            for row, one in enumerate(conversations)
            if not isinstance(one, Ids)
            for pair in self._pairs(one)
        ]
        encoded = encode_pairs(self.tokenizer, [(pair.prompt, pair.answer) for _, pair in texts])
        tally = _Tally()
        rows: list[list[TokenSpans]] = [[] for _ in conversations]
        for (row, pair), whole in zip(texts, encoded, strict=True):
            head = whole.token_ids[: whole.prompt_length]
            tail = whole.token_ids[whole.prompt_length :]
            skip = 0 if self.thinking else self._thought(pair, head, tail)
            ids = Ids(prompt_ids=head, answer_ids=tail, skip=skip)
            tally.merged += whole.merged
            rows[row].append(self._spans(f"{row}:{len(rows[row])}", ids, tally))
        for row, one in enumerate(conversations):
            if isinstance(one, Ids):
                rows[row].append(self._spans(f"{row}:0", one, tally))
        unanswered = sum(isinstance(c, Chat) and not _answered(c) for c in conversations)
        return Spans(
            rows=rows,
            counts=Counts(rows=len(rows), unanswered=unanswered, **vars(tally)),
        )

    def _pairs(self, one: Chat | Pair) -> Iterator[Pair]:
        if isinstance(one, Pair):
            yield one
            return
        messages = one.messages
        places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self.turns == "last":
            places = places[-1:] if _answered(one) else []
        for place in places:
            prompt = self._render(messages[:place])
            yield Pair(prompt=prompt, answer=messages[place]["content"])
        if not places:
            yield Pair(prompt=self._render(messages), answer="")

    def _render(self, messages: Sequence[Message]) -> str:
        return render_prompt(self.tokenizer, messages, thinking=self.thinking)

    def _thought(self, pair: Pair, head: Sequence[int], tail: Sequence[int]) -> int:
        """Return how many tokens of the answer are thinking; most texts show at once: none."""
        opened = THINK_OPEN in pair.answer or pair.prompt[-32:].rstrip().endswith(THINK_OPEN)
        if not opened and THINK_CLOSE not in pair.answer:
            return 0
        return think_length(self.tokenizer, tail, prompt_ids=head)

    def _spans(self, identity: str, ids: Ids, tally: _Tally) -> TokenSpans:
        whole = spans_from_ids(
            identity, prompt_ids=ids.prompt_ids, answer_ids=ids.answer_ids, skip=ids.skip
        )
        start, stop = whole.spans["response"]
        tally.answers += 1
        tally.empty += start == stop
        stop = len(whole.token_ids)
        if "response" not in self.needed:
            stop = max(whole.spans["prompt"][1], 1)
        cut = max(stop - self.limit, 0) if self.limit is not None else 0
        tally.truncated += cut > 0
        tally.cut_answers += cut > whole.spans["prompt"][1]
        return TokenSpans(
            id=identity,
            token_ids=whole.token_ids[cut:stop],
            spans={name: _moved(whole.spans[name], cut, stop) for name in self.needed},
        )


@dataclass
class _Tally:
    answers: int = 0
    empty: int = 0
    truncated: int = 0
    cut_answers: int = 0
    merged: int = 0


def problem_of(messages: object) -> str | None:
    """Return what is wrong with a row's chat messages, or None: the end of a sentence."""
    if not isinstance(messages, list) or not messages:
        return "has no list of messages"
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            return f"has a message without text (the {number}. of {len(messages)})"
        if message.get("role") not in ("system", "user", "assistant"):
            return f"has the role {message.get('role')!r}, which is not system, user or assistant"
    return None


def _answered(chat: Chat) -> bool:
    return chat.messages[-1]["role"] == "assistant"


def _moved(span: tuple[int, int], cut: int, stop: int) -> tuple[int, int]:
    """Return a span after ``cut`` tokens went from the front and those from ``stop`` on."""
    first, last = span
    return max(min(first, stop) - cut, 0), max(min(last, stop) - cut, 0)
