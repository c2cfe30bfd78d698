"""Which tokens of a conversation carry loss: exactly what the model would have to say itself.

For every assistant turn that is what stands between the generation prompt and the end of the turn,
with the end-of-turn token. The places are found in the *rendered text* of the whole conversation,
so that no template needs ``{% generation %}`` marks and no text is tokenised in pieces:

- the start is where the prompt for that turn ends, if the rendering begins with that prompt, else
  where the turn's text begins (a template may rewrite earlier turns, as Qwen3 does);
- the end is where the turn's text ends, found by rendering once more with a mark behind it; the
  token that follows must be a special one, the end of the turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from pvec.errors import InputError
from pvec.models.chat import THINK
from pvec.models.template import render_prompt
from pvec.steering.positions import IGNORED_LABEL
from pvec.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\ue0fe"
"""A private-use character: no template rewrites it and no sane text contains it."""


@dataclass(frozen=True, kw_only=True)
class TokenizedRow:
    """A conversation as token ids, and the same ids with -100 where no loss is."""

    token_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def loss_tokens(self) -> int:
        """How many tokens carry loss (the very first token never does: nothing predicts it)."""
        return sum(label != IGNORED_LABEL for label in self.labels[1:])

    def truncated(self, length: int) -> TokenizedRow:
        """Return the first ``length`` tokens."""
        return TokenizedRow(token_ids=self.token_ids[:length], labels=self.labels[:length])


def tokenize_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    loss_on_all: bool = False,
    without_loss: frozenset[int] = frozenset(),
) -> TokenizedRow:
    """Tokenise a conversation and label the assistant's tokens (all of them with ``loss_on_all``).

    ``without_loss`` are the places of assistant's messages that stay without a label.
    Raises ``InputError`` for a template that refuses the conversation, rewrites an assistant's
    text, or ends its turn without a token; and for a tokenizer without offsets.
    """
    turns = [dict(message) for message in messages]
    text = render_prompt(tokenizer, turns, add_generation_prompt=False)
    if not tokenizer.is_fast:
        raise InputError(
            "This tokenizer gives no offsets, so the assistant's tokens cannot be found: use a "
            "fast tokenizer (tokenizer.json)."
        )
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoding["input_ids"]
    offsets: list[tuple[int, int]] = encoding["offset_mapping"]
    labels = list(ids) if loss_on_all else [IGNORED_LABEL] * len(ids)
    for turn, message in enumerate(turns):
        has_loss = turn not in without_loss
        if message["role"] == "assistant" and has_loss != loss_on_all:
            for position in _turn_tokens(tokenizer, turns, turn, text, ids, offsets):
                labels[position] = ids[position] if has_loss else IGNORED_LABEL
    return TokenizedRow(token_ids=tuple(ids), labels=tuple(labels))


def _turn_tokens(
    tokenizer: PreTrainedTokenizerBase,
    turns: list[dict[str, str]],
    turn: int,
    text: str,
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
) -> list[int]:
    """Return the positions of the tokens that the model says in one turn."""
    start, stop = _turn_text(tokenizer, turns, turn, text)
    inside = [i for i, (a, b) in enumerate(offsets) if b > start and a < stop and b > a]
    first = inside[0] if inside else sum(b <= start for _, b in offsets)  # an empty turn has none
    after = first + len(inside)
    while after < len(ids) and text[slice(*offsets[after])].isspace():
        after += 1  # white space that a template writes before the end of the turn
    if after == len(ids) or ids[after] not in _special_ids(tokenizer):
        raise InputError(
            "The chat template ends an assistant's turn without a special token, so the model "
            "could not learn to stop: use a template that writes one."
        )
    return list(range(first, after + 1))


def _turn_text(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], turn: int, text: str
) -> tuple[int, int]:
    """Return where in ``text`` what the model says in a turn starts and stops (characters)."""
    stop = _place(tokenizer, turns, turn, text, after=True)
    answer = turns[turn]["content"].rpartition(THINK.end)[2].strip()
    if stop is None or not text[:stop].rstrip().endswith(answer):
        raise InputError(
            "The chat template rewrites what the assistant says, so its tokens cannot be told: use "
            "a template that writes the turn's text as it is."
        )
    for thinking in (False, True) if turn else ():
        prompt = render_prompt(tokenizer, turns[:turn], thinking=thinking)
        if text.startswith(prompt) and len(prompt) < stop:
            return len(prompt), stop
    start = _place(tokenizer, turns, turn, text, after=False)
    if start is None:
        raise InputError(
            "The chat template hides where an assistant's turn begins: use a template whose "
            "generation prompt is the beginning of the turn."
        )
    return start, stop


def _place(
    tokenizer: PreTrainedTokenizerBase,
    turns: list[dict[str, str]],
    turn: int,
    text: str,
    *,
    after: bool,
) -> int | None:
    """Return where a mark before or after a turn's text lands, if it changes nothing else."""
    content = turns[turn]["content"]
    for written in (content, content.strip()):  # a template may strip, which a mark would prevent
        marked = [*turns]
        marked[turn] = {**turns[turn], "content": written + _MARK if after else _MARK + written}
        rendered = render_prompt(tokenizer, marked, add_generation_prompt=False)
        if rendered.count(_MARK) == 1 and rendered.replace(_MARK, "") == text:
            return rendered.index(_MARK)
    return None


@lru_cache(maxsize=8)
def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))
