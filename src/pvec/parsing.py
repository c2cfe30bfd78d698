"""JSON text that others wrote, read with limits: whatever is in it, the answer is a value or one
sentence's end that says what is wrong with it.
"""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = 100
"""Lists and objects inside one another; deeper text is an attack or a mistake."""

MAX_DIGITS = 4300
"""Digits of an integer, as Python itself limits them."""

_BOM = b"\xef\xbb\xbf"


class TextError(ValueError):
    """Text that is not the JSON that it should be; the message is the end of a sentence."""


def parse_json(text: bytes) -> Any:
    """Return the JSON value in UTF-8 ``text``.

    Raises ``TextError`` for another encoding, NUL bytes, invalid JSON, a key that an object has
    twice, nesting beyond ``MAX_DEPTH`` and integers beyond ``MAX_DIGITS``.

    >>> parse_json(b'{"a": 1}')
    {'a': 1}
    >>> parse_json(b'{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ...
    pvec.parsing.TextError: has the key 'a' twice
    """
    try:
        decoded = text.removeprefix(_BOM).decode()
    except UnicodeDecodeError:
        raise TextError("is not UTF-8 text") from None
    if "\x00" in decoded:
        raise TextError("holds NUL bytes, so it is not UTF-8 text (is it UTF-16?)")
    try:
        value = json.loads(decoded, object_pairs_hook=_object, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise TextError(f"is not valid JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise TextError(f"is nested deeper than {MAX_DEPTH} levels") from None
    if decoded.count("[") + decoded.count("{") > MAX_DEPTH and _too_deep(value):
        raise TextError(f"is nested deeper than {MAX_DEPTH} levels")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise TextError(f"has the key {twice!r} twice")
    return values


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise TextError(f"holds an integer of more than {MAX_DIGITS} digits")
    return int(digits)


def _too_deep(value: object) -> bool:
    """Whether values lie more than ``MAX_DEPTH`` levels deep; level by level, so no recursion."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inside
            for item in level
            if isinstance(item, list | dict)
            for inside in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return True
