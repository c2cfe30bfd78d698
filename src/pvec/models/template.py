"""The chat template of a model: tried once with test messages, then trusted for what it showed.

Trying it finds whether system prompts and content are taken, by which name thinking is switched,
which token ends an assistant's turn, and whether today's date is written into every prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from difflib import SequenceMatcher
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from jinja2 import Environment, TemplateError, meta

from pvec.errors import InputError
from pvec.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USER, _SYSTEM, _ANSWER = "question-text", "system-text", "answer-text"

_SWITCH_VALUES: tuple[tuple[Any, Any], ...] = ((True, False), ("on", "off"))
"""What switches thinking on and off, under whatever name the template has for it."""

_ABOUT_THINKING = re.compile(r"think|thought|reason|\bcot\b|_cot", re.IGNORECASE)
_NEGATIVE = re.compile(
    r"(^|_)(no|not|non|without|disable|skip|hide|omit|off|none)(_|$)|^no", re.IGNORECASE
)
_NOT_SWITCHES = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token")
)

_DATES: WeakKeyDictionary[Any, datetime] = WeakKeyDictionary()
"""Tokenizer → the date that its template sees."""


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """What a chat template supports, determined by rendering test messages.

    ``parts``: content is taken as a list of parts only. ``thinking`` is the name of the variable
    that switches thinking and its values for on and off, or None where there is no switch.
    ``end_of_turn`` is the token that ends an assistant's turn, or None where it is no special
    token. ``dated``: prompts contain today's date.
    """

    takes_system: bool
    parts: bool = False
    thinking: tuple[str, Any, Any] | None = None
    end_of_turn: int | None = None
    dated: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        """What pvec does about it, in words for the user."""
        notes = []
        if not self.takes_system:
            notes.append(
                "the chat template has no system role: "
                "system prompts are put before the first user turn"
            )
        if self.thinking is not None:
            notes.append(
                "the chat template has a thinking mode: off by default, enabled by --thinking on"
            )
        return tuple(notes)


def chat_format(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """Return what the tokenizer's chat template supports.

    Raises ``InputError`` when there is no template, or when it drops what the user says.
    """
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
    turns: list[Any] = [dict(message) for message in messages]
    if not form.takes_system:
        turns = _merge_system(turns)
    if form.parts:
        turns = [_in_parts(turn) for turn in turns]
    options = {}
    if form.thinking is not None:
        name, on, off = form.thinking
        options[name] = on if thinking else off
    return _render(tokenizer, turns, add_generation_prompt=add_generation_prompt, **options)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that ends an assistant's turn, if the tokenizer has a template with one."""
    return chat_format(tokenizer).end_of_turn if tokenizer.chat_template else None


def is_dated(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes today's date into prompts."""
    return bool(tokenizer.chat_template) and chat_format(tokenizer).dated


def set_date(tokenizer: PreTrainedTokenizerBase, date: datetime) -> None:
    """Let the chat template see ``date`` as today, so that a run's prompts stay what they were."""
    _DATES[tokenizer] = date


def date_seen(tokenizer: PreTrainedTokenizerBase) -> datetime:
    """Return the date that the chat template sees: that of the first use, or as set."""
    return _DATES.setdefault(tokenizer, datetime.now())


def template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of the chat template, empty when there is none."""
    template: Any = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    return str(template or "")


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    text = template_text(tokenizer)
    if not text:
        raise InputError(
            f"{_name(tokenizer)} has no chat template: use an instruction-tuned model, or give a "
            f"template with --chat-template FILE."
        )
    return text


@lru_cache(maxsize=16)
def _probe(tokenizer: PreTrainedTokenizerBase, template: str) -> ChatFormat:
    """Try the template (part of the key, as a tokenizer's template can be replaced)."""
    user: dict[str, Any] = {"role": "user", "content": _USER}
    system: dict[str, Any] = {"role": "system", "content": _SYSTEM}
    parts = _USER not in _render(tokenizer, [user])
    if parts:
        user, system = _in_parts(user), _in_parts(system)
        if _USER not in _rendered(tokenizer, [user]):
            raise InputError(
                f"The chat template of {_name(tokenizer)} drops what the user says, as text and as "
                f"content parts: give another template with --chat-template FILE."
            )
    both = _rendered(tokenizer, [system, user])
    answer: dict[str, Any] = {"role": "assistant", "content": _ANSWER}
    turns = [user, _in_parts(answer) if parts else answer]
    return ChatFormat(
        takes_system=_SYSTEM in both and _USER in both,
        parts=parts,
        thinking=_thinking_switch(tokenizer, template, user),
        end_of_turn=_end_of_turn(tokenizer, turns),
        dated=_is_dated(tokenizer, [user]) or _is_dated(tokenizer, [system, user]),
    )


def _thinking_switch(
    tokenizer: PreTrainedTokenizerBase, template: str, user: Mapping[str, Any]
) -> tuple[str, Any, Any] | None:
    """Return the variable of the template that switches thinking, and its values for on and off.

    It must change the prompt otherwise than by being written into it. Where its name does not speak
    of thinking, what it changes must.
    """
    names = _variables(template) - _NOT_SWITCHES
    for name in sorted(names, key=lambda n: (n != "enable_thinking", n)):
        if _ANSWER in _rendered(tokenizer, [user], **{name: _ANSWER}):
            continue  # whatever it is, it is written into the prompt
        for on, off in _switch_values(name, template):
            texts = [_rendered(tokenizer, [user], **{name: value}) for value in (on, off)]
            if not all(_USER in text for text in texts) or texts[0] == texts[1]:
                continue
            if _ABOUT_THINKING.search(f"{name} {_difference(*texts)}"):
                return name, on, off
    return None


def _switch_values(name: str, template: str) -> Iterator[tuple[Any, Any]]:
    """Yield values for on and off that a variable of this name may take."""
    if "budget" in name:
        yield -1, 0
        return
    if "effort" in name:  # a degree, unless the template knows one that is none
        if re.search(r"['\"]none['\"]", template):
            yield "high", "none"
        return
    for on, off in _SWITCH_VALUES:
        yield (off, on) if _NEGATIVE.search(name) else (on, off)
    compared = re.findall(rf"\b{re.escape(name)}\s*[!=]=\s*['\"]([^'\"]*)['\"]", template)
    for value in dict.fromkeys(compared):
        yield ("on", value) if _NEGATIVE.search(value) else (value, "off")


def _difference(text: str, other: str) -> str:
    """Return what two texts have where they differ."""
    changes = SequenceMatcher(a=text, b=other, autojunk=False).get_opcodes()
    return " ".join(text[a:b] + other[c:d] for kind, a, b, c, d in changes if kind != "equal")


def _variables(template: str) -> set[str]:
    """Return the names that a template reads and does not set, or sets where they are missing."""
    environment = Environment(  # noqa: S701 - it is read, never rendered
        extensions=["jinja2.ext.loopcontrols"]
    )
    source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)  # transformers' own tag
    try:
        return set(meta.find_undeclared_variables(environment.parse(source)))
    except TemplateError:
        return {"enable_thinking"}


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Any]) -> int | None:
    """Return the special token that ends an answer, at the end or before another turn."""
    last = _turn_end(tokenizer, _rendered(tokenizer, turns, add_generation_prompt=False))
    if last is not None:
        return last
    text = _rendered(tokenizer, [*turns, turns[0]])
    end = _turn_end(tokenizer, text)
    if end is None or str(tokenizer.convert_ids_to_tokens(end)) in text.partition(_USER)[0]:
        return None  # it begins a turn
    return end


def _turn_end(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """Return the first special token after the answer in a rendered conversation that ends with it.

    Text in between, other than white space, belongs to a template that ends turns in words.
    """
    rest = text.rpartition(_ANSWER)[2] if _ANSWER in text else ""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {token.content: number for number, token in added.items() if token.special}
    ends = [content for content in special if rest.strip().startswith(content)]
    return special[max(ends, key=len)] if ends else None


def _is_dated(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Any]) -> bool:
    """Whether the prompt changes from one time to another, in any part of a date or hour."""
    times = (datetime(2001, 2, 3, 4, 5, 6), datetime(2032, 11, 28, 17, 38, 49))
    texts = {_rendered(tokenizer, turns, strftime_now=time.strftime) for time in times}
    return len(texts) > 1


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Any], **options: Any) -> str:
    """Return what the template makes of test messages; nothing when it refuses them."""
    try:
        return _render(tokenizer, turns, **options)
    except InputError:
        return ""


def _render(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Any],
    *,
    add_generation_prompt: bool = True,
    strftime_now: Callable[[str], str] | None = None,
    **options: Any,
) -> str:
    if "strftime_now" in template_text(tokenizer):
        options["strftime_now"] = strftime_now or date_seen(tokenizer).strftime
    try:
        text = tokenizer.apply_chat_template(
            [dict(turn) for turn in turns],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **options,
        )
    except (TemplateError, TypeError) as error:
        roles = ", ".join(str(turn["role"]) for turn in turns)
        raise InputError(
            f"The chat template of {_name(tokenizer)} refuses a conversation of the roles {roles} "
            f"({error}): change the turns or the template."
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


def _in_parts(turn: Mapping[str, Any]) -> dict[str, Any]:
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]}


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.name_or_path or "this tokenizer")
