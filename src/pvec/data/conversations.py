"""A row of a file as a conversation, in whatever chat format it is written.

The one reader of chat formats: ``project``, ``screen``, ``monitor`` and ``train`` understand the
same rows. Understood are messages as OpenAI writes them (``messages``; text parts, the role
``developer`` and ``weight`` included), ShareGPT (``conversations``), Alpaca (``instruction``,
``input``, ``output``), TRL's conversational ``prompt`` with ``completion``, and a prompt beside its
answer. A row that holds something else, or a key of these formats that pvec does not honour, is
refused with the format's name and the remedy: nothing in it is dropped without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pvec.errors import InputError
from pvec.types import Message

_NO_TOOLS = "tool calling, which pvec does not read: remove those turns, or leave the row out"
_MEDIA = "images, sound or video, which pvec does not read: leave the row out"
_REASONING = "reasoning beside the text: write it into the content, as the chat template does"
_REMOVE = "which pvec does not use: remove the key if it should have no effect"

_UNREAD_ROW_KEYS = {
    "tools": _NO_TOOLS,
    "functions": _NO_TOOLS,
    "images": _MEDIA,
    "videos": _MEDIA,
    "audios": _MEDIA,
    "documents": _REMOVE,
    "chat_template_kwargs": _REMOVE,
}
_UNREAD_MESSAGE_KEYS = {
    "tool_calls": _NO_TOOLS,
    "tool_call_id": _NO_TOOLS,
    "function_call": _NO_TOOLS,
    "images": _MEDIA,
    "audio": _MEDIA,
    "refusal": _REMOVE,
    "name": _REMOVE,
    "reasoning": _REASONING,
    "reasoning_content": _REASONING,
    "thinking": _REASONING,
}
_OPENAI_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
_SHAREGPT_ROLES = {
    **_OPENAI_ROLES,
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
_TOOL_ROLES = frozenset(("tool", "function", "ipython", "observation", "function_call"))


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
    """A conversation as messages. One that does not end with an answer is a prompt without one.

    ``without_loss`` are the places of the assistant's messages that training must not learn.
    """

    messages: Sequence[Message]
    without_loss: frozenset[int] = frozenset()

    @property
    def answered(self) -> bool:
        """Whether it ends with an answer."""
        return self.messages[-1]["role"] == "assistant"

    @property
    def answer_places(self) -> list[int]:
        """The places of the assistant's messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]


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


def conversation_of(values: Mapping[str, Any], columns: Columns) -> Chat | Pair:
    """Return the conversation in a row's cells.

    Raises ``InputError`` with what is wrong with the row and what to do: the end of a sentence that
    begins with the row's place.
    """
    if columns.messages in values:
        return _chat(_openai(values[columns.messages], name=columns.messages), values)
    if "conversations" in values:
        return _chat(_sharegpt(values["conversations"]), values)
    prompt, answer = values.get(columns.prompt), values.get(columns.answer)
    if columns.prompt not in values and {"instruction", "output"} <= values.keys():
        return _chat(_alpaca(values), values)
    if isinstance(prompt, list):
        ending = values.get("completion", answer)
        turns = [*_openai(prompt, name=columns.prompt)]
        if ending is not None:
            turns += _openai(ending, name="completion")
        return _chat(turns, values)
    _refuse_other_formats(values, columns)
    if columns.answer not in values and "completion" in values:
        answer = values["completion"]
    question = _text(prompt, f"has no text as its {columns.prompt!r}")
    # without an answer a row is kept, and counted as empty
    reply = "" if answer is None else _text(answer, f"has no text as its {columns.answer!r}")
    if not columns.plain_prompts:
        return Pair(prompt=question, answer=reply)
    turns = [_Turn("user", question), _Turn("assistant", reply)]
    return _chat(turns, values)


@dataclass(frozen=True)
class _Turn:
    """One message as it was read; ``weight`` 0 is not learnt."""

    role: str
    content: str
    weight: float = 1.0


def _chat(read: Iterable[_Turn], values: Mapping[str, Any]) -> Chat:
    """Return turns as a chat, under the row's own system prompt if it has one."""
    turns = list(read)
    for key, reason in _UNREAD_ROW_KEYS.items():
        if values.get(key):
            raise InputError(f"has {key!r}: {reason}")
    system = values.get("system")
    if system:
        if turns and turns[0].role == "system":
            raise InputError("has a 'system' beside a system message: keep one of them")
        system = _text(system, "has a 'system' that is no text")
        turns = [_Turn("system", system), *turns]
    if not turns:
        raise InputError("has no list of messages")
    first = next((turn for turn in turns if turn.role != "system"), None)
    if first is not None and first.role == "assistant":
        raise InputError(
            "begins with an answer of the assistant: remove that turn, or put the user's before it"
        )
    return Chat(
        messages=[{"role": turn.role, "content": turn.content} for turn in turns],
        without_loss=frozenset(
            place
            for place, turn in enumerate(turns)
            if turn.role == "assistant" and not turn.weight
        ),
    )


def _openai(messages: object, *, name: str) -> Iterator[_Turn]:
    """Yield the turns of ``[{"role": …, "content": …}, …]``."""
    for message in _listed(messages, name=name):
        yield _turn(message, role_key="role", text_key="content", roles=_OPENAI_ROLES)


def _sharegpt(messages: object) -> Iterator[_Turn]:
    """Yield the turns of ``[{"from": "human", "value": …}, …]``."""
    for message in _listed(messages, name="conversations"):
        if "from" in message:
            yield _turn(message, role_key="from", text_key="value", roles=_SHAREGPT_ROLES)
        else:
            yield _turn(message, role_key="role", text_key="content", roles=_SHAREGPT_ROLES)


def _alpaca(values: Mapping[str, Any]) -> Iterator[_Turn]:
    """Yield the turns of an instruction with its input and output."""
    history = values.get("history") or []
    if not isinstance(history, list):
        raise InputError("has an Alpaca 'history' that is no list")
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InputError("has an Alpaca 'history' that is no list of question and answer")
        yield _Turn("user", _text(pair[0], "has no text in its 'history'"))
        yield _Turn("assistant", _text(pair[1], "has no text in its 'history'"))
    instruction = _text(values["instruction"], "has no text as its 'instruction'")
    more = values.get("input")
    if more:
        instruction += "\n" + _text(more, "has no text as its 'input'")
    yield _Turn("user", instruction)
    yield _Turn("assistant", _text(values["output"], "has no text as its 'output'"))


def _listed(messages: object, *, name: str) -> list[Mapping[str, Any]]:
    if isinstance(messages, str):
        raise InputError(f"has text as its {name!r}, not a list of messages")
    if not isinstance(messages, list) or not messages:
        raise InputError("has no list of messages")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise InputError(f"has a message without text (the {number}. of {len(messages)})")
    return messages


def _turn(
    message: Mapping[str, Any], *, role_key: str, text_key: str, roles: Mapping[str, str]
) -> _Turn:
    role = message.get(role_key)
    if isinstance(role, str) and role in _TOOL_ROLES:
        raise InputError(f"has the role {role!r}: {_NO_TOOLS}")
    for key, reason in _UNREAD_MESSAGE_KEYS.items():
        if message.get(key):
            raise InputError(f"has {key!r} in a message: {reason}")
    if not isinstance(role, str) or role not in roles:
        raise InputError(f"has the role {role!r}, which is not system, user or assistant")
    weight = _weight(message)
    if message.get("weight") and roles[role] != "assistant":
        raise InputError("has a 'weight' on a message that is not the assistant's: remove it")
    return _Turn(roles[role], _content(message.get(text_key)), weight)


def _weight(message: Mapping[str, Any]) -> float:
    """Return a message's weight in the loss: ``weight`` of OpenAI, ``train`` of axolotl."""
    for key in ("weight", "train"):
        weight = message.get(key)
        if weight is None:
            continue
        if isinstance(weight, int | float) and weight in (0, 1):
            return float(weight)
        raise InputError(f"has the {key} {weight!r} on a message: it can be 0 or 1")
    return 1.0


def _content(content: object) -> str:
    """Return a message's text; that of several text parts is joined."""
    if not isinstance(content, list):
        return _text(content, "has a message without text")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or kind not in ("text", "input_text", "output_text"):
            raise InputError(f"has a content part of the type {kind!r}: {_MEDIA}")
        parts.append(_text(part.get("text"), "has a text part without text"))
    return "".join(parts)


def _text(value: object, otherwise: str) -> str:
    """Return ``value`` if it is text. Raises ``InputError`` that says ``otherwise``."""
    if not isinstance(value, str):
        raise InputError(otherwise)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(
            "holds half of a surrogate pair (such as \\ud83d alone), which is no character: "
            "correct the text"
        ) from None
    return value


def has_conversations(names: Iterable[str], columns: Columns) -> bool:
    """Whether a table with columns of these ``names`` can hold conversations."""
    present = set(names)
    return (
        bool(present & {columns.messages, "conversations"})
        or {"instruction", "output"} <= present
        or (columns.prompt in present and bool(present & {columns.answer, "completion", "chosen"}))
    )


def _refuse_other_formats(values: Mapping[str, Any], columns: Columns) -> None:
    """Raise ``InputError``, with the remedy, for a row that is of a format without one answer."""
    known = {columns.prompt, columns.answer}
    if {"chosen", "rejected"} <= values.keys() - known and columns.answer not in values:
        raise InputError(
            "is a preference pair ('chosen' and 'rejected'): name the answers to use, such as "
            "--answer-column chosen"
        )
    if columns.prompt not in values:
        held = "'text'" if "text" in values else "none of the chat formats"
        raise InputError(
            f"has no list of messages (it holds {held}): give {columns.messages!r}, or "
            f"{columns.prompt!r} and {columns.answer!r}"
        )
    if "completion" in values and columns.answer not in values and not columns.plain_prompts:
        raise InputError(
            "is a text 'prompt' with a 'completion': write it as messages, or say "
            "--answer-column completion where prompts are rendered and --plain-prompts where they "
            "are questions"
        )
