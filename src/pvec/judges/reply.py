"""What comes back from a chat endpoint, read with suspicion: servers differ, proxies interfere."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard


class MalformedReply(ValueError):  # noqa: N818 - names the reply, not the fault
    """A reply with status 200 that is no chat completion; asking again may help."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the model wrote. ``positions[i]`` are the (token, probability) pairs at token i, the
    likeliest tokens first; empty when the server gave no logprobs. A probability is NaN where the
    server's logprob is no number below zero. ``tokens`` are those written.
    """

    text: str
    tokens: tuple[str, ...] = ()
    positions: tuple[tuple[tuple[str, float], ...], ...] = ()
    refusal: str | None = None
    finish_reason: str = "stop"


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens that the server counted."""

    prompt: int
    completion: int


@dataclass(frozen=True, kw_only=True)
class ErrorReply:
    """What a server says of a request that it did not answer, wherever in the body it says it.

    ``message`` is for people. ``text`` holds all that names a cause in lower case: messages,
    parameters, codes. ``code`` is the error's own status where it has one.
    """

    message: str
    text: str
    code: int | None = None

    @property
    def filtered(self) -> bool:
        """Whether a content filter refused the prompt."""
        return _FILTERED.search(self.text) is not None


_FILTERED = re.compile(
    r"content[ _-]?(?:filter|management|polic)|responsible ?ai|moderation|flagged"
    r"|prohibited[ _]content|safety (?:system|filter|reason|polic)"
    r"|violat\w*.{0,60}(?:polic|guideline|usage|terms)"
)
_MOST_TOKENS = 10_000_000
"""A usage beyond this is no count of tokens."""


def parse_body(content: bytes) -> dict[str, Any]:
    """Return the JSON object in a reply's body; raises ``MalformedReply`` for anything else."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise MalformedReply("the server's reply is no JSON") from error
    if not isinstance(body, dict):
        raise MalformedReply("the server's reply is no JSON object")
    return body


def parse_usage(body: Mapping[str, Any]) -> Usage | None:
    """Return what the server counted, or None when it does not say or says the impossible."""
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not (_is_count(prompt) and _is_count(completion)):
        return None
    return Usage(prompt=prompt, completion=completion)


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= _MOST_TOKENS


def parse_reply(body: Mapping[str, Any]) -> Reply:
    """Read a chat completion, however little of it is there; raises ``MalformedReply`` for less."""
    try:
        choice = body["choices"][0]
        message = choice["message"]
        entries = (choice.get("logprobs") or {}).get("content") or []
        tokens = tuple(str(entry["token"]) for entry in entries)
        positions = tuple(_position(entry.get("top_logprobs") or ()) for entry in entries)
        refusal = message.get("refusal")
        return Reply(
            text=_text(message.get("content")),
            tokens=tokens,
            positions=positions if all(positions) else (),
            refusal=str(refusal) if refusal else None,
            finish_reason=str(choice.get("finish_reason") or "stop"),
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise MalformedReply("the server's reply is no chat completion") from error


def _text(content: Any) -> str:
    """Return the text of a message: a string, or the text parts of a list."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if _is_map(part))
    return str(content or "")


def _position(top: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, float], ...]:
    return tuple((str(entry["token"]), _probability(entry["logprob"])) for entry in top)


def _probability(logprob: Any) -> float:
    if isinstance(logprob, bool) or not isinstance(logprob, int | float):
        return math.nan
    if not logprob <= 0.01:  # NaN, or no probability; a hair above 0 is rounding
        return math.nan
    return math.exp(max(min(logprob, 0), -1e4))  # -9999 stands for "not among the likeliest"


# -- errors ---------------------------------------------------------------------------------------

_MESSAGES = ("message", "msg", "detail", "error", "raw")
_CAUSES = (*_MESSAGES, "param", "code", "type", "status", "loc", "reasons")
_DEPTH = 12


def parse_error(content: bytes) -> ErrorReply:
    """Read an error's body: OpenAI's object, Gemini's list, xAI's string, FastAPI's ``detail``,
    OpenRouter's ``metadata.raw``, or plain text.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        text = content[:2000].decode(errors="replace").strip()
        body = "" if text.startswith("<") else text  # a proxy's page says nothing of the cause
    causes = list(_causes(body, key="message", depth=0))
    # The innermost message is the provider's own; those around it say that there is one.
    messages = [text for key, text in causes if key in _MESSAGES]
    return ErrorReply(
        message=messages[-1] if messages else "",
        text=" ".join(text for _, text in causes).lower(),
        code=error_code(body),
    )


def error_code(body: Any) -> int | None:
    """Return the HTTP status that an error's body holds."""
    inner = body.get("error") if _is_map(body) else None
    code = inner.get("code") if _is_map(inner) else None
    return code if type(code) is int and 400 <= code < 600 else None


def is_error(body: Mapping[str, Any]) -> bool:
    """Whether a body that came with status 200 is an error all the same."""
    choices = body.get("choices")
    if isinstance(choices, list) and choices:
        return _is_map(choices[0]) and bool(choices[0].get("error"))
    return bool(body.get("error") or body.get("detail"))


def _causes(value: Any, *, key: str, depth: int) -> Iterator[tuple[str, str]]:
    """Yield (key, text) of what names a cause, from the outside in."""
    if depth > _DEPTH:
        return
    if isinstance(value, str) and value:
        inner = _json_inside(value)
        if inner is None:
            yield key, value[:2000]
        else:
            yield from _causes(inner, key=key, depth=depth + 1)
    elif _is_map(value):
        plain = [k for k in value if not isinstance(value[k], dict | list)]
        for name in (*plain, *(k for k in value if k not in plain)):
            if name in _CAUSES or (isinstance(value[name], dict | list) and name != "input"):
                yield from _causes(value[name], key=str(name), depth=depth + 1)
    elif isinstance(value, list):
        for item in value[:20]:
            yield from _causes(item, key=key, depth=depth + 1)


def _json_inside(text: str) -> Any:
    """Return the object that a string holds as JSON, or None."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        inner = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return inner if isinstance(inner, dict | list) else None


def _is_map(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)
