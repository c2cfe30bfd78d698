"""From messages to token ids and spans: pure functions on a tokenizer.

The chat template writes every special token itself, so nothing here adds any (no double BOS). Where
token ids are known, text is never tokenised again to find a boundary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pvec.models.template import render_prompt
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
