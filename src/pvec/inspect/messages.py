"""Between ``inspect_ai`` and pvec: messages, arguments, errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from inspect_ai._util.error import PrerequisiteError
from inspect_ai.model import ChatMessage

from pvec.errors import InputError, PvecError
from pvec.types import Message


@contextmanager
def prerequisites() -> Iterator[None]:
    """Turn pvec's errors into those that ``inspect`` shows as a sentence, without a traceback."""
    try:
        yield
    except PvecError as error:
        raise PrerequisiteError(str(error)) from None


def texts(value: Any) -> tuple[str, ...]:
    """Return an argument as texts: absent, one, or a list."""
    if value is None:
        return ()
    return tuple(map(str, value)) if isinstance(value, list | tuple) else (str(value),)


def spoken(message: ChatMessage) -> Message:
    """Return a message as pvec's parts take it, without reasoning. Raises ``InputError`` for one
    with tools or with anything but text.
    """
    content = message.content
    if message.role == "tool" or getattr(message, "tool_calls", None):
        raise InputError("pvec does not support 'tools' here: use pvec-serve on vLLM for them.")
    if not isinstance(content, str) and any(
        part.type not in ("text", "reasoning") for part in content
    ):
        raise InputError("pvec reads texts only: leave images, sound and files out.")
    return {"role": message.role, "content": message.text}
