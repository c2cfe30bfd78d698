"""Servers as they are in the field: what they reject, how they say it, and that scores come."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from pvec.errors import InputError, JudgeError
from pvec.judges.openai import OpenAIJudge
from pvec.judges.pacing import Patience
from pvec.judges.reply import parse_error
from pvec.judges.server import server_url
from pvec.types import JudgeQuery
from tests.helpers.judge_server import JudgeServer, number_for

Dialect = Callable[[str, dict[str, Any]], tuple[int, Any] | None]


def queries(count: int) -> list[JudgeQuery]:
    return [
        JudgeQuery(
            id=f"s{n}",
            response_id=f"r{n}",
            metric="evil",
            messages=({"role": "user", "content": f"How evil is answer {n}?"},),
        )
        for n in range(count)
    ]


def expected(count: int) -> dict[str, float]:
    return {f"s{n}": float(number_for(f"How evil is answer {n}?")) for n in range(count)}


def limit_of(body: dict[str, Any]) -> int:
    return int(body.get("max_tokens") or body.get("max_completion_tokens") or 0)


def gemini(_path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
    """A list as the body; a capital letter; a number in the model's name that is no maximum."""
    message = "Logprobs is not enabled for models/gemini-2.5-flash"
    error = {"error": {"code": 400, "message": message, "status": "INVALID_ARGUMENT"}}
    return (400, [error]) if body.get("logprobs") else None


def gemini_fields(_path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
    named = [name for name in ("seed", "logprobs", "top_logprobs") if name in body]
    message = " ".join(f'Unknown name "{name}": Cannot find field.' for name in named)
    return (400, [{"error": {"code": 400, "message": message}}]) if named else None


def xai(_path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
    """A string where others have an object, and a maximum that is to be kept to."""
    message = "Invalid request content: top_logprobs must be less than or equal to 8"
    return (400, {"code": "bad", "error": message}) if body.get("top_logprobs", 0) > 8 else None


def vllm(_path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
    asked = body.get("top_logprobs", 0)
    message = f"Requested sample logprobs of {asked}, which is greater than max allowed: 10"
    return (400, {"object": "error", "message": message, "code": 400}) if asked > 10 else None


def fastapi(_path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
    extra = [name for name in ("seed", "logprobs", "top_logprobs") if name in body]
    detail = [
        {"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted"}
        for name in extra
    ]
    return (422, {"detail": detail}) if extra else None


def openrouter(_path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
    """The provider's own words, as JSON inside of a string."""
    if limit_of(body) >= 16:
        return None
    message = (
        f"Invalid 'max_output_tokens': integer below minimum value. Expected a value >= 16, "
        f"but got {limit_of(body)} instead."
    )
    raw = json.dumps({"error": {"message": message, "param": "max_output_tokens"}})
    return 400, {"error": {"message": "Provider returned error", "metadata": {"raw": raw}}}


def openrouter_200(path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
    reply = openrouter(path, body)
    if reply is not None:
        reply[1]["error"]["code"] = 400
        return 200, reply[1]
    return None


def plain_string(_path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
    return (400, "logprobs is not supported") if body.get("logprobs") else None


def gpt5(_path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
    """Four refusals one after the other, the last of a limit that pvec chose itself."""
    if "max_tokens" in body:
        message, status = "Unsupported parameter: use 'max_completion_tokens' instead.", 400
    elif body.get("temperature", 1) != 1:
        message, status = "Unsupported value: 'temperature' does not support 0.", 400
    elif body.get("logprobs"):
        message, status = "You are not allowed to request logprobs from this model", 403
    elif limit_of(body) < 64:
        status = 400
        message = (
            "Could not finish the message because max_tokens or model output limit was reached. "
            "Please try again with higher max_tokens."
        )
    else:
        return None
    return status, {"error": {"message": message, "type": "invalid_request_error"}}


@pytest.mark.parametrize(
    ("dialect", "kept"),
    [
        (gemini, {"logprobs": None, "seed": 0, "temperature": 0}),
        (gemini_fields, {"logprobs": None, "seed": None, "temperature": 0}),
        (xai, {"logprobs": True, "top_logprobs": 8, "max_tokens": 1}),
        (vllm, {"logprobs": True, "top_logprobs": 10}),
        (fastapi, {"logprobs": None, "seed": None, "temperature": 0}),
        (openrouter, {"logprobs": True, "top_logprobs": 20, "max_tokens": 16}),
        (openrouter_200, {"logprobs": True, "top_logprobs": 20, "max_tokens": 16}),
        (plain_string, {"logprobs": None, "seed": 0}),
        (gpt5, {"logprobs": None, "temperature": None, "max_completion_tokens": 64}),
    ],
)
def test_a_server_is_asked_in_the_way_that_it_takes(dialect: Dialect, kept: dict[str, Any]) -> None:
    patience = Patience(tries=2, first_wait=0.005)
    with (
        JudgeServer(dialect=dialect) as server,
        OpenAIJudge("m", base_url=server.url, patience=patience, concurrency=4) as judge,
    ):
        scores = {score.id: score.score for score in judge.score(queries(20))}
    assert scores == expected(20)
    sent = server.bodies[-1]
    assert {name: sent.get(name) for name in kept} == kept
    # It learns once: every score costs one request, and one or two in flight while it learned.
    assert server.asked.total() < 20 + 12


def test_a_url_with_a_query_is_asked_with_it_and_named_without() -> None:
    paths = []

    def azure(path: str, _body: dict[str, Any]) -> tuple[int, Any] | None:
        paths.append(path)
        right = "/deployments/gpt/chat/completions?" in path and "api-version=2024-10-21" in path
        return None if right else (404, {"error": {"message": "Resource not found"}})

    with JudgeServer(dialect=azure) as server:
        base = server.url.removesuffix("/v1").replace("http://", "http://me:secret@")
        url = f"{base}/openai/deployments/gpt?api-version=2024-10-21"
        with OpenAIJudge("m", base_url=url) as judge:
            scores = {score.id: score.score for score in judge.score(queries(3))}
    assert scores == expected(3)
    assert "secret" not in judge.name
    with JudgeServer(dialect=lambda *_: (401, {"error": "no"})) as server:
        url = f"{server.url.replace('http://', 'http://me:secret@')}?key=abc"
        with OpenAIJudge("m", base_url=url) as judge, pytest.raises(JudgeError) as caught:
            judge.check()
    assert "secret" not in str(caught.value)
    assert "abc" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["localhost:8000", "http://", "http://[::1", "http://host:99999/v1", "ftp://host/v1"]
)
def test_what_is_no_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InputError, match="not a valid URL"):
        server_url(url, option="--judge-url")
    with pytest.raises(InputError) as caught:
        server_url("httpx://me:pass/word@host/v1?key=abc", option="--judge-url")
    assert "word" not in str(caught.value).replace("password", "")
    assert "abc" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "no", "code": 400}}', "no"),
        (b'[{"error": {"message": "no"}}]', "no"),
        (b'{"error": "no"}', "no"),
        (b'{"detail": "no"}', "no"),
        (b'{"detail": [{"loc": ["body", "seed"], "msg": "no"}]}', "no"),
        (b'{"error": {"message": "Provider returned error", "metadata": {"raw": "no"}}}', "no"),
        (b'"no"', "no"),
        (b"no", "no"),
        (b"<html>no</html>", ""),
        (b"", ""),
        (b"[" * 100_000, ""),
    ],
)
def test_the_cause_is_read_wherever_the_body_has_it(body: bytes, message: str) -> None:
    if body.startswith(b"[["):
        assert len(parse_error(body).message) <= 2000
    else:
        assert parse_error(body).message == message


def test_an_answer_that_is_echoed_does_not_name_a_parameter() -> None:
    """The error quotes the request, whose text speaks of seeds: nothing is left out for that."""
    detail = [
        {"loc": ["body", "messages"], "msg": "too long", "input": "plant a seed, unsupported"}
    ]

    def echo(_path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
        return (422, {"detail": detail}) if "answer 3?" in str(body["messages"]) else None

    with JudgeServer(dialect=echo) as server, OpenAIJudge("m", base_url=server.url) as judge:
        scores = {score.id: score for score in judge.score(queries(5))}
    assert scores["s3"].status == "error"
    assert all("seed" in body for body in server.bodies)
