"""From messages to token ids and spans: pure functions on a tokenizer.

The chat template writes every special token itself, so nothing here adds any (no double BOS). Where
token ids are known, text is never tokenised again to find a boundary.

Reasoning that a model writes before its answer is found by the model's own marks: the pair that the
tokenizer or the chat template knows; ``<think>`` is understood for every model. The answer alone is
judged and averaged.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from pvec.models.template import render_prompt, template_text
from pvec.types import Instruction, Message, SpanName, TokenSpans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Prompt and answer tokenised as one text.

    ``merged`` says that a token straddles the boundary; it counts as the answer's.
    """

    token_ids: tuple[int, ...]
    prompt_length: int
    merged: bool = False


@dataclass(frozen=True, kw_only=True)
class Marks:
    """The texts that begin and end reasoning."""

    begin: str
    end: str


THINK = Marks(begin="<think>", end="</think>")

_KNOWN = (
    Marks(begin="<|channel|>", end="<|channel|>final<|message|>"),  # harmony: the final channel
    Marks(begin="<|channel>", end="<channel|>"),
    Marks(begin="<|think|>", end="<|begin|>assistant<|content|>"),
    Marks(begin="<|inner_prefix|>", end="<|inner_suffix|>"),
    Marks(begin="Here is my thought process:", end="Here is my response:"),
    Marks(begin="## Thinking", end="## Final Response"),
    Marks(begin="<unused94>", end="<unused95>"),
)
"""Marks that are not of the kinds of ``_PAIRS``."""

_PAIRS = (
    (re.compile(r"([<\[◁|:]+)(\w*(?:think|thought|reason)\w*)([>\]▷|]+)", re.I), r"\1/\2\3"),
    (re.compile(r"(<\|)(START)(_\w*THINK\w*\|>)"), r"\1END\3"),
    (re.compile(r"(<\|)(begin)(_of_thought\|>)"), r"\1end\3"),
    (re.compile(r"(<)(seed)(:think>)"), r"</\2\3"),
)
"""How marks that name what they are begin, and how such a mark becomes the one that ends."""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Return the token ids of a rendered prompt; no special token is added."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, thinking: bool = False
) -> tuple[int, ...]:
    """Return the token ids of the prompt that ``messages`` make (see ``render_prompt``)."""
    return encode_prompt(tokenizer, render_prompt(tokenizer, messages, thinking=thinking))


def encode_pair(tokenizer: PreTrainedTokenizerBase, *, prompt: str, answer: str) -> Encoded:
    """Tokenise ``prompt + answer`` as one text and find the boundary from the offsets."""
    if not tokenizer.is_fast:
        return _encode_apart(tokenizer, prompt, answer)
    encoding = tokenizer(prompt + answer, add_special_tokens=False, return_offsets_mapping=True)
    return _split(encoding["input_ids"], encoding["offset_mapping"], prompt=prompt)


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> list[Encoded]:
    """Do ``encode_pair`` for many (prompt, answer) pairs in one call of the tokenizer."""
    if not tokenizer.is_fast or not pairs:
        return [encode_pair(tokenizer, prompt=prompt, answer=answer) for prompt, answer in pairs]
    encoding = tokenizer(
        [prompt + answer for prompt, answer in pairs],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,  # the caller truncates a text that is too long
    )
    return [
        _split(ids, offsets, prompt=prompt)
        for ids, offsets, (prompt, _) in zip(
            encoding["input_ids"], encoding["offset_mapping"], pairs, strict=True
        )
    ]


def spans_from_ids(
    identity: str,
    *,
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    skip: int = 0,
    steering: tuple[Instruction, ...] = (),
) -> TokenSpans:
    """Return the three spans of a prompt and its answer (without an end-of-turn token).

    ``skip`` leaves out that many tokens at the answer's start: its think span (``think_length``).
    """
    ids = (*prompt_ids, *answer_ids)
    start = len(prompt_ids)
    spans: dict[SpanName, tuple[int, int]] = {
        "prompt": (0, start),
        "prompt_last": (max(start - 1, 0), start),
        "response": (min(start + skip, len(ids)), len(ids)),
    }
    return TokenSpans(id=identity, token_ids=ids, spans=spans, steering=steering)


def _split(ids: Sequence[int], offsets: Sequence[tuple[int, int]], *, prompt: str) -> Encoded:
    """Find where the prompt ends among the tokens of prompt and answer, from their offsets."""
    first = next((i for i, (_, stop) in enumerate(offsets) if stop > len(prompt)), len(ids))
    merged = first < len(ids) and offsets[first][0] < len(prompt)
    return Encoded(token_ids=tuple(ids), prompt_length=first, merged=merged)


def _encode_apart(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> Encoded:
    """Tokenise both parts on their own, for the few tokenizers that give no offsets."""
    head = encode_prompt(tokenizer, prompt)
    joint = encode_prompt(tokenizer, prompt + answer)
    if joint[: len(head)] == head:
        return Encoded(token_ids=joint, prompt_length=len(head))
    tail = encode_prompt(tokenizer, answer)
    return Encoded(token_ids=head + tail, prompt_length=len(head))


def think_length(
    tokenizer: PreTrainedTokenizerBase, answer_ids: Sequence[int], *, prompt_ids: Sequence[int] = ()
) -> int:
    """Return how many tokens at the answer's start are reasoning (0 when there is none).

    Counts up to and including the last mark that ends it and the white space after it. Reasoning
    that was begun (in the answer, or by the prompt's last tokens) and never ended is the whole
    answer.
    """
    text = _text(tokenizer, answer_ids)
    known = reasoning_marks(tokenizer)
    for marks in known:
        if marks.end in text:
            return _skip_space(tokenizer, answer_ids, _tokens_up_to(tokenizer, answer_ids, marks))
    for marks in known:  # only then: one beginning can have several possible ends
        begun = text.lstrip().startswith(marks.begin)
        if begun or _text(tokenizer, prompt_ids[-8:]).rstrip().endswith(marks.begin):
            return len(answer_ids)
    return 0


class ThinkTracker:
    """Tells, token by token while an answer is generated, whether it is within its reasoning.

    Reasoning begins with a mark that the prompt ends with or the answer begins with, and ends with
    the first mark that ends it. ``thinking`` has an entry for the last prompt token, and for every
    token that was given to ``follow``: whether a mark had begun reasoning and none had ended it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._begins = {marks.begin for marks in reasoning_marks(tokenizer)}
        self._ends = {marks.end for marks in reasoning_marks(tokenizer)}
        self._window = max(len(mark.encode()) for mark in self._begins | self._ends)
        self._since = 0
        self._settled = False
        opened = _text(tokenizer, prompt_ids[-self._window :]).rstrip()
        self.thinking = [opened.endswith(tuple(self._begins))]

    def follow(self, answer_ids: Sequence[int]) -> None:
        """Take the answer so far, of which earlier calls may have had the first tokens."""
        for stop in range(len(self.thinking), len(answer_ids) + 1):
            self.thinking.append(self._inside_after(answer_ids, stop))

    def _inside_after(self, answer_ids: Sequence[int], stop: int) -> bool:
        """Return whether the answer's first ``stop`` tokens end within reasoning."""
        inside = self.thinking[-1]
        if self._settled:
            return inside
        text = _text(self._tokenizer, answer_ids[max(self._since, stop - self._window) : stop])
        if inside:
            self._settled = any(mark in text for mark in self._ends)
            return not self._settled
        if text.lstrip().startswith(tuple(self._begins)):
            self._since = stop
            return True
        self._settled = stop >= self._window
        return False


def may_reason(tokenizer: PreTrainedTokenizerBase, *, prompt: str, answer: str) -> bool:
    """Whether there can be reasoning in an answer, seen from the texts alone (most have none)."""
    return any(
        marks.begin in answer or marks.end in answer or prompt[-32:].rstrip().endswith(marks.begin)
        for marks in reasoning_marks(tokenizer)
    )


def answer_text(tokenizer: PreTrainedTokenizerBase, answer_ids: Sequence[int], think: int) -> str:
    """Return the text after the first ``think`` tokens, special tokens left out."""
    return str(tokenizer.decode(list(answer_ids[think:]), skip_special_tokens=True)).lstrip()


def reasoning_marks(tokenizer: PreTrainedTokenizerBase) -> tuple[Marks, ...]:
    """Return the marks that the model may write: ``<think>``, and those that it was made with."""
    return _marks(tokenizer, template_text(tokenizer))


@lru_cache(maxsize=16)
def _marks(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[Marks, ...]:
    added = {t.content for t in getattr(tokenizer, "added_tokens_decoder", {}).values()}
    texts = (*sorted(added), template)
    named = {
        Marks(begin=match[0], end=match.expand(end))
        for text in texts
        for begin, end in _PAIRS
        for match in begin.finditer(text)
    }
    known = [m for m in _KNOWN if m.begin in added or m.begin in template]
    return (*known, *sorted(named, key=lambda m: (m.begin, m.end)), THINK)


def _tokens_up_to(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], marks: Marks) -> int:
    """Return the smallest number of leading tokens whose text holds all of the last end mark."""
    total = _text(tokenizer, ids).count(marks.end)
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        if _text(tokenizer, ids[:middle]).count(marks.end) >= total:
            high = middle
        else:
            low = middle + 1
    return low


def _skip_space(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int) -> int:
    while start < len(ids) and not _text(tokenizer, ids[start : start + 1]).strip():
        start += 1
    return start


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids)))
