"""OpenAI's requests as this server reads them, and its form of an error.

Nothing that a client asks for is passed over: an option that would change the answer and that this
server cannot do is refused, unless it is at the value that changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from pvec.documents import parse_json
from pvec.errors import InputError, PvecError, SteeringError
from pvec.serve.answers import InternalError
from pvec.serve.rules import PvecBody, RefusedError, Strict, sentence
from pvec.types import Message

Model = TypeVar("Model", bound=Strict)
Neutral = tuple[Any, ...]

UNSUPPORTED: Mapping[str, Neutral] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "min_p": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (-1, 0),
    "top_logprobs": (0,),
}
"""OpenAI's and vLLM's options that this server cannot do, and the values that ask for nothing."""


class ApiError(Exception):
    """A response that is an error, in OpenAI's form."""

    def __init__(
        self, status: int, message: str, *, kind: str = "invalid_request_error", code: str = ""
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {
            "error": {"message": message, "type": kind, "param": None, "code": code or None}
        }


class StreamOptions(Strict):
    """What a stream tells besides the text."""

    include_usage: bool = False


class Body(Strict):
    """What both endpoints take. ``user`` names the client's user and changes nothing."""

    model: str
    n: int = Field(default=1, ge=1, le=128)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] = Field(default=[])
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str = ""
    pvec: PvecBody | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts at which the answer ends."""
        return tuple(text for text in ([self.stop] if isinstance(self.stop, str) else self.stop))


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """A turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def message(self) -> Message:
        """Return the turn as pvec's parts take it."""
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(Body):
    """A request to /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)


class CompletionBody(Body):
    """A request to /v1/completions: texts, or token ids."""

    prompt: str | list[int] | list[str] | list[list[int]]

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one answer (or ``n``) for each."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


def read_object(content: bytes) -> dict[str, Any]:
    """Return the JSON object in ``content``. Raises ``ApiError`` (400) that says what is wrong."""
    try:
        values = parse_json(content.decode(), where="The request's body")
    except UnicodeDecodeError:
        raise ApiError(400, "The request's body is not UTF-8: send JSON.") from None
    except InputError as error:
        raise ApiError(400, str(error)) from None
    if not isinstance(values, dict):
        raise ApiError(400, "The request's body must be a JSON object: send one.")
    return values


def read_body(content: bytes, kind: type[Body]) -> Any:
    """Return the request in ``content``. Raises ``ApiError`` (400) that names what is wrong."""
    values = read_object(content)
    given = {name: value for name, value in values.items() if value is not None}
    for name in [name for name in given if name in UNSUPPORTED]:
        value = given.pop(name)
        same = [v for v in UNSUPPORTED[name] if v == value and type(v) is type(value)]
        if not same and not (value == 0.0 and 0 in UNSUPPORTED[name] and value is not False):
            raise ApiError(
                400,
                f"This server does not support {name!r} with this value: leave it out.",
                code="unsupported_parameter",
            )
    body = validated(kind, given)
    if "stream_options" in given and not body.stream:
        raise ApiError(400, "'stream_options' goes with 'stream': leave it out, or stream.")
    if {"max_tokens", "max_completion_tokens"} <= given.keys():
        raise ApiError(400, "'max_tokens' and 'max_completion_tokens' are one limit: send one.")
    if len(body.stops) > 16 or not all(body.stops):
        raise ApiError(400, "'stop' takes up to 16 texts, none of them empty: correct it.")
    return body


def validated(kind: type[Model], values: Mapping[str, Any]) -> Model:
    """Return ``values`` as a ``kind``. Raises ``ApiError`` (400) that names what is wrong."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        text = sentence(error)
        raise ApiError(400, text[0].upper() + text[1:]) from None


def api_error(error: PvecError, *, hide: Mapping[str, str]) -> ApiError:
    """Return how a client hears of an error; ``hide`` replaces texts not for it (paths)."""
    message = str(error)
    for text, instead in hide.items():
        message = message.replace(text, instead)
    if isinstance(error, SteeringError | InternalError):
        return ApiError(500, message, kind="server_error")
    if isinstance(error, RefusedError):
        return ApiError(403, message, kind="permission_error")
    return ApiError(400, message)
