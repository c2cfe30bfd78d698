"""Conversations as token spans.

What becomes of several turns, of a missing answer and of a row that is too long is decided here and
counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from pvec.data.conversations import Chat, Conversation, Ids, Pair
from pvec.errors import InputError
from pvec.models.chat import encode_pairs, may_reason, spans_from_ids, think_length
from pvec.models.template import render_prompt
from pvec.types import Message, SpanMeans, SpanName, TokenSpans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = Literal["last", "all", "each"]
"""Which answers of a conversation count: the one it ends with, all pooled, or each by itself."""


@dataclass(kw_only=True)
class Counts:
    """How many rows there were, and how many of them need a word to the user.

    ``empty`` answers have no token to average over; ``unanswered`` conversations do not end with
    an answer; ``truncated`` rows lost the beginning of their prompt; ``cut_answers`` of these are
    longer than the context by themselves and lost their own beginning too; ``merged`` share a token
    between prompt and answer. ``thinking`` answers begin with ``think_tokens`` tokens of reasoning,
    which are not averaged.
    """

    rows: int = 0
    answers: int = 0
    empty: int = 0
    unanswered: int = 0
    truncated: int = 0
    cut_answers: int = 0
    merged: int = 0
    thinking: int = 0
    think_tokens: int = 0

    def __add__(self, other: Counts) -> Counts:
        """Return the counts of both."""
        return Counts(**{k: v + getattr(other, k) for k, v in vars(self).items()})

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of them, each a line; nothing where all rows are ordinary."""
        lines = (
            (self.empty, "answers without a token (empty cells)"),
            (self.unanswered, "conversations that do not end with an answer"),
            (self.truncated, "rows longer than the context (their prompt's beginning was cut)"),
            (self.cut_answers, "of them with an answer that is longer by itself (it was cut too)"),
            (self.merged, "answers whose first token began in the prompt"),
            (self.thinking, thinking_note(self.think_tokens)),
        )
        return tuple(f"{number:,} {text}" for number, text in lines if number)


def thinking_note(tokens: int) -> str:
    """Return what is said, after their number, of answers whose thinking is left out."""
    return (
        f"answers think: their {tokens:,} tokens of thinking are left out, while the reference "
        f"implementation counts them (--thinking on includes them)"
    )


@dataclass(frozen=True, kw_only=True)
class Spans:
    """The token spans of several conversations: ``rows[i]`` holds one per turn that counts.

    ``refused`` says of the rows that have none what the chat template has against them.
    """

    rows: list[list[TokenSpans]]
    counts: Counts
    refused: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SpanMaker:
    """Turns conversations into spans.

    A row that the chat template refuses has none and is named; the others go on. ``needed`` are the
    spans that will be averaged: without ``response`` the answers are left out of the computation.
    Reasoning is a span of its own with ``think``, else part of the response with ``thinking``, else
    left out.
    ``limit`` is the number of tokens the model reads (None: any).
    """

    tokenizer: PreTrainedTokenizerBase
    needed: Sequence[SpanName]
    turns: Turns = "last"
    thinking: bool = False
    limit: int | None = None

    def __call__(self, conversations: Sequence[Conversation]) -> Spans:
        """Return the spans of every conversation; ids are ``row:turn``."""
        counts, refused = Counts(rows=len(conversations)), {}
        rows: list[list[TokenSpans]] = [[] for _ in conversations]
        texts: list[tuple[str, str]] = []
        places: list[int] = []
        for row, conversation in enumerate(conversations):
            if isinstance(conversation, Ids):
                rows[row].append(self._spans(f"{row}:0", conversation, counts))
                continue
            if isinstance(conversation, Chat):
                counts.unanswered += not conversation.answered
            try:
                turns = list(self._texts(conversation))
            except InputError as error:
                refused[row] = str(error)
                continue
            texts += turns
            places += [row] * len(turns)
        encoded = encode_pairs(self.tokenizer, texts)
        for row, (prompt, answer), whole in zip(places, texts, encoded, strict=True):
            head = whole.token_ids[: whole.prompt_length]
            tail = whole.token_ids[whole.prompt_length :]
            thinks = may_reason(self.tokenizer, prompt=prompt, answer=answer)  # most texts: no
            skip = think_length(self.tokenizer, tail, prompt_ids=head) if thinks else 0
            ids = Ids(prompt_ids=head, answer_ids=tail, skip=skip)
            counts.merged += whole.merged
            rows[row].append(self._spans(f"{row}:{len(rows[row])}", ids, counts))
        return Spans(rows=rows, counts=counts, refused=refused)

    def _texts(self, conversation: Chat | Pair) -> Iterator[tuple[str, str]]:
        """Yield the rendered prompt and the answer of every turn that counts."""
        if isinstance(conversation, Pair):
            yield conversation.prompt, conversation.answer
            return
        messages, places = conversation.messages, conversation.answer_places
        if self.turns == "last":
            places = places[-1:] if conversation.answered else []
        for place in places:
            yield self._render(messages[:place]), messages[place]["content"]
        if not places:
            yield self._render(messages), ""

    def _render(self, messages: Sequence[Message]) -> str:
        return render_prompt(self.tokenizer, messages, thinking=self.thinking)

    def _spans(self, identity: str, ids: Ids, counts: Counts) -> TokenSpans:
        apart = "think" in self.needed
        ignored = self.thinking or "response" not in self.needed
        skip = 0 if ignored and not apart else ids.skip
        counts.thinking += skip > 0 and not apart
        counts.think_tokens += 0 if apart else skip
        whole = spans_from_ids(
            identity, prompt_ids=ids.prompt_ids, answer_ids=ids.answer_ids, skip=skip
        )
        start, stop = whole.spans["response"]
        spans: dict[SpanName, tuple[int, int]] = {
            **whole.spans, "think": (whole.spans["prompt"][1], start)
        }  # fmt: skip
        counts.answers += 1
        counts.empty += start == stop
        stop = len(whole.token_ids)
        if "response" not in self.needed:
            stop = max(spans["think" if apart else "prompt"][1], 1)
        cut = max(stop - self.limit, 0) if self.limit is not None else 0
        counts.truncated += cut > 0
        counts.cut_answers += cut > whole.spans["prompt"][1]
        return TokenSpans(
            id=identity,
            token_ids=whole.token_ids[cut:stop],
            spans={name: _moved(spans[name], cut, stop) for name in self.needed},
        )


class TemplateCheck:
    """Tells, before any weights are loaded, which conversations the chat template refuses.

    What a template refuses is the order of the roles, so each order is rendered once.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, turns: Turns = "last") -> None:
        self._tokenizer = tokenizer
        self._turns = turns
        self._known: dict[tuple[str, ...], str] = {}

    def __call__(self, conversation: Conversation) -> None:
        """Raise ``InputError``, the end of a sentence, for a conversation that is refused."""
        if not isinstance(conversation, Chat):
            return
        roles = tuple(message["role"] for message in conversation.messages)
        if roles not in self._known:
            maker = SpanMaker(tokenizer=self._tokenizer, needed=(), turns=self._turns)
            self._known[roles] = maker([conversation]).refused.get(0, "")
        if reason := self._known[roles]:
            raise InputError(f"is refused: {reason.removesuffix('.')}")


def _moved(span: tuple[int, int], cut: int, stop: int) -> tuple[int, int]:
    """Return a span after ``cut`` tokens went from the front and those from ``stop`` on."""
    first, last = span
    return max(min(first, stop) - cut, 0), max(min(last, stop) - cut, 0)


def pool_turns(
    captured: Iterable[SpanMeans], rows: Sequence[Sequence[TokenSpans]]
) -> Iterator[SpanMeans]:
    """Yield one ``SpanMeans`` per row: the mean over the tokens of all its turns' spans."""
    tokens = {s.id: {name: b - a for name, (a, b) in s.spans.items()} for r in rows for s in r}
    turns: dict[str, list[SpanMeans]] = {}
    expected = {f"{number}:0": sum(bool(s.token_ids) for s in r) for number, r in enumerate(rows)}
    for item in captured:
        row = item.id.partition(":")[0] + ":0"
        turns.setdefault(row, []).append(item)
        if len(turns[row]) == expected[row]:
            done = turns.pop(row)
            means = {
                span: _weighted([t.means[span] for t in done], [tokens[t.id][span] for t in done])
                for span in item.means
            }
            yield SpanMeans(id=row, layers=item.layers, means=means, norms={})


def _weighted(means: Sequence[np.ndarray], tokens: Sequence[int]) -> np.ndarray:
    """Return the mean of ``means`` ``[layers, H]`` by tokens; NaN where there are none."""
    kept = [(mean, n) for mean, n in zip(means, tokens, strict=True) if n]
    if not kept:
        return np.full_like(means[0], np.nan)
    arrays, weights = zip(*kept, strict=True)
    pooled: np.ndarray = np.average(np.stack(arrays).astype(np.float64), axis=0, weights=weights)
    return pooled
