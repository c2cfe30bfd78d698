"""From messages to token ids and spans: pure functions on a tokenizer.

The chat template writes every special token itself, so nothing here adds any (no double BOS). Where
token ids are known, text is never tokenised again to find a boundary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from pvec.errors import InputError
from pvec.types import Instruction, Message, SpanName, TokenSpans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """What a chat template supports, determined by rendering test messages."""

    takes_system: bool
    thinking_switch: bool

    @property
    def notes(self) -> tuple[str, ...]:
        """What pvec does about it, in words for the user."""
        notes = []
        if not self.takes_system:
            notes.append(
                "the chat template has no system role: "
                "system prompts are put before the first user turn"
            )
        if self.thinking_switch:
            notes.append(
                "the chat template has a thinking mode: thinking is off unless --thinking on"
            )
        return tuple(notes)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Prompt and answer tokenised as one text.

    ``merged`` says that a token straddles the boundary; it counts as the answer's.
    """

    token_ids: tuple[int, ...]
    prompt_length: int
    merged: bool = False


def chat_format(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """Return what the tokenizer's chat template supports; ``InputError`` when it has none."""
    return _probe(tokenizer, _template(tokenizer))


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    thinking: bool = False,
    add_generation_prompt: bool = True,
) -> str:
    """Return the prompt text that the chat template makes of ``messages``.

    Thinking is switched off where the template has a switch, unless ``thinking``. A system message
    that the template does not take is put before the first user turn. Raises ``InputError`` when
    there is no template or it refuses the messages.
    """
    form = chat_format(tokenizer)
    turns = [dict(message) for message in messages]
    if not form.takes_system:
        turns = _merge_system(turns)
    options = {"enable_thinking": thinking} if form.thinking_switch else {}
    return _render(tokenizer, turns, add_generation_prompt=add_generation_prompt, **options)


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


def spans_from_text(
    identity: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: str,
    answer: str,
    include_thinking: bool = False,
    steering: tuple[Instruction, ...] = (),
) -> TokenSpans:
    """Return the spans of a rendered prompt and an answer that are known as text only."""
    pair = encode_pair(tokenizer, prompt=prompt, answer=answer)
    head, tail = pair.token_ids[: pair.prompt_length], pair.token_ids[pair.prompt_length :]
    skip = 0 if include_thinking else think_length(tokenizer, tail, prompt_ids=head)
    return spans_from_ids(identity, prompt_ids=head, answer_ids=tail, skip=skip, steering=steering)


def conversation_spans(
    identity: str,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    include_thinking: bool = False,
) -> tuple[TokenSpans, ...]:
    """Return one ``TokenSpans`` per assistant turn: that turn after the conversation before it.

    Each is what the model would have seen when it gave that answer. Ids are ``identity`` for a
    single turn and ``identity#k`` for the k-th of several.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return tuple(
        spans_from_text(
            identity if len(turns) == 1 else f"{identity}#{number}",
            tokenizer,
            prompt=render_prompt(tokenizer, messages[:index]),
            answer=messages[index]["content"],
            include_thinking=include_thinking,
        )
        for number, index in enumerate(turns)
    )


def think_length(
    tokenizer: PreTrainedTokenizerBase, answer_ids: Sequence[int], *, prompt_ids: Sequence[int] = ()
) -> int:
    """Return how many tokens at the answer's start are thinking (0 when it does not think).

    Counts up to and including the last ``</think>`` and the white space after it. Thinking that was
    opened (in the answer, or by the prompt's last tokens) and never closed is the whole answer.
    """
    close = _single_token(tokenizer, THINK_CLOSE)
    if close is not None:
        stop = max((i + 1 for i, token in enumerate(answer_ids) if token == close), default=0)
    else:
        stop = _tokens_up_to(tokenizer, answer_ids, THINK_CLOSE)
    if stop:
        return _skip_space(tokenizer, answer_ids, stop)
    opened = _text(tokenizer, prompt_ids[-8:]).rstrip().endswith(THINK_OPEN)
    opened = opened or _text(tokenizer, answer_ids[:16]).lstrip().startswith(THINK_OPEN)
    return len(answer_ids) if opened else 0


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    template: Any = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    if not template:
        raise InputError(
            f"{tokenizer.name_or_path or 'This tokenizer'} has no chat template: use an "
            f"instruction-tuned model, or give a template with --chat-template FILE."
        )
    return str(template)


@lru_cache(maxsize=16)
def _probe(tokenizer: PreTrainedTokenizerBase, _template_text: str) -> ChatFormat:
    """Try the template (part of the key, as a tokenizer's template can be replaced)."""
    user = {"role": "user", "content": "question-text"}
    system = {"role": "system", "content": "system-text"}
    try:
        takes_system = "system-text" in _render(tokenizer, [system, user])
    except InputError:
        takes_system = False
    on = _render(tokenizer, [user], enable_thinking=True)
    off = _render(tokenizer, [user], enable_thinking=False)
    return ChatFormat(takes_system=takes_system, thinking_switch=on != off)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    **options: Any,
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            [dict(turn) for turn in turns],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **options,
        )
    except TemplateError as error:
        roles = ", ".join(str(turn["role"]) for turn in turns)
        raise InputError(
            f"The chat template of {tokenizer.name_or_path or 'this tokenizer'} refuses a "
            f"conversation of the roles {roles} ({error}): change the turns or the template."
        ) from error
    return str(text)


def _merge_system(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """Put the system texts before the first user turn's text, a blank line between."""
    systems = [turn["content"] for turn in turns if turn["role"] == "system"]
    rest = [dict(turn) for turn in turns if turn["role"] != "system"]
    if not systems:
        return rest
    first = next((turn for turn in rest if turn["role"] == "user"), None)
    if first is None:
        return [{"role": "user", "content": "\n\n".join(systems)}, *rest]
    first["content"] = "\n\n".join([*systems, first["content"]])
    return rest


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


def _single_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    ids = encode_prompt(tokenizer, text)
    return ids[0] if len(ids) == 1 else None


def _tokens_up_to(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], marker: str) -> int:
    """Return the smallest number of leading tokens whose text holds all of the last ``marker``."""
    total = _text(tokenizer, ids).count(marker)
    if not total:
        return 0
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        if _text(tokenizer, ids[:middle]).count(marker) >= total:
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
