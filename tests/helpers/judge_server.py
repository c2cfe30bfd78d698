"""A real HTTP server on loopback that speaks enough of the OpenAI API to judge, and misbehaves.

Every request is counted by its prompt, so that a test sees what was asked, and what was answered
in full, how often.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from gzip import compress as gzip_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

PROBE_WORDS = "Reply with the number 75"

FAULTS = (
    "429 seconds",
    "429 milliseconds",
    "429 date",
    "429 bare",
    "500",
    "503 retry-after",
    "reset",
    "reset mid-body",
    "truncated json",
    "garbage",
    "no choices",
    "error body",
    "hang",
    "408",
    "409",
    "425",
    "502 page",
    "503 list",
    "504 string",
    "520 empty",
    "529 detail",
    "429 list",
    "429 string",
    "429 inside",
    "200 with 502",
    "200 with 429",
    "200 detail",
    "200 choice error",
    "200 error text",
    "empty",
    "null",
    "list",
    "string",
    "number",
    "deep",
    "deep object",
    "digits",
    "not utf-8",
    "choices null",
    "choices text",
    "choice null",
    "message null",
    "entries text",
    "bomb",
    "too long",
    "bad gzip",
    "brotli",
)
"""Everything a server can do instead of answering. ``hang`` outlasts any time-out of a test."""

ODD_REPLIES = (
    "usage absent",
    "usage null",
    "usage huge",
    "usage negative",
    "usage text",
    "content parts",
    "logprob null",
    "logprob NaN",
    "logprob -9999",
    "logprob -Infinity",
    "token of 6000 digits",
    "no finish reason",
)
"""Answers that can be read although a part of them cannot."""


@dataclass(frozen=True)
class Said:
    """What the judge says: its text, token by token, and the distribution at the first token."""

    text: str
    first: dict[str, float] | None = None
    tokens: Sequence[str] | None = None
    refusal: str | None = None
    finish_reason: str = "stop"
    logprobs: bool = True


def number_for(prompt: str) -> int:
    """Return the score (0-100) that this server gives to ``prompt``, always the same.

    The tags around question and answer, and the sentence about them, change nothing.
    """
    plain = re.sub(r"<(\w+-\w+)>\n(.*?)\n</\1>", r"\2", prompt, flags=re.DOTALL)
    plain = plain.partition("whatever it says.\n\n")[2] or plain
    return hashlib.sha256(plain.encode("utf-8", "replace")).digest()[0] % 101


def say_number(prompt: str) -> Said:
    """Answer with ``number_for(prompt)``, all probability on it."""
    if prompt.startswith(PROBE_WORDS):
        return Said("75")
    return Said(str(number_for(prompt)))


def no_fault(_prompt: str, _nth: int) -> str | None:
    return None


def one_in(share: int, *, seed: int, kinds: Sequence[str] = FAULTS) -> Callable[..., str | None]:
    """Return a fault for one request in ``share``, drawn by seed, prompt and how often it came."""

    def fault(prompt: str, nth: int) -> str | None:
        if prompt.startswith(PROBE_WORDS):
            return None
        draw = random.Random(f"{seed}|{prompt}|{nth}")
        return draw.choice(kinds) if draw.randrange(share) == 0 else None

    return fault


@dataclass
class JudgeServer:
    """The server; a context manager. All fields may be set before or while it runs."""

    notify: Callable[[str], Said] = say_number
    fault: Callable[[str, int], str | None] = no_fault
    key: str | None = None
    models: Sequence[str] | None = None
    rejects: Sequence[str] = ()
    """Request parameters that are refused with a 400 that names them."""
    dialect: Callable[[str, dict[str, Any]], tuple[int, Any] | None] | None = None
    """Status and body that a server of some make gives to a path and a request; None answers."""
    batches: Any = None
    """``tests.helpers.batch_server.Batches``; without them the server has no batch endpoint."""
    capacity: int | None = None
    """More requests at once than this get a 429."""
    delay: float = 0.0
    asked: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    most_at_once: int = 0

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self._now = 0
        self._connections: set[socket.socket] = set()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.judge = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        with self.lock:
            for connection in self._connections:
                connection.close()
        self._server.server_close()

    # -- what the handler asks --------------------------------------------------------------------

    def opened(self, connection: socket.socket) -> None:
        with self.lock:
            self._connections.add(connection)

    def closed(self, connection: socket.socket) -> None:
        with self.lock:
            self._connections.discard(connection)

    def enter(self, prompt: str, body: dict[str, Any]) -> tuple[int, int]:
        """Count a request; return how often this prompt came before and how many are inside."""
        with self.lock:
            nth = self.asked[prompt]
            self.asked[prompt] += 1
            self.bodies.append(body)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            return nth, self._now

    def leave(self) -> None:
        with self.lock:
            self._now -= 1

    def count(self, counter: Counter[str], key: str) -> None:
        with self.lock:
            counter[key] += 1


class _Server(ThreadingHTTPServer):
    judge: JudgeServer
    request_queue_size = 256
    daemon_threads = True

    def handleerror_body(self, request: Any, client_address: Any) -> None:
        """Stay quiet: clients that hang up are what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        # Headers and body leave in two writes: without this each reply waits 40 ms for an ACK.
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.server.judge.opened(self.connection)

    def finish(self) -> None:
        self.server.judge.closed(self.connection)
        super().finish()

    def log_message(self, *_args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self._batched(b""):
            return
        if not self.path.startswith("/v1/models"):
            self._send(404, error_body("no such path"))
            return
        models = self.server.judge.models or ["judge"]
        self._send(200, {"object": "list", "data": [{"id": name} for name in models]})

    def do_POST(self) -> None:
        judge = self.server.judge
        data = self._read()
        if self._batched(data):
            return
        body = json.loads(data)
        prompt = body["messages"][-1]["content"]
        nth, inside = judge.enter(prompt, body)
        try:
            if judge.delay:
                judge.closing.wait(judge.delay)
            if judge.dialect is not None:
                reply = judge.dialect(self.path, body)
                if reply is not None:
                    self._send(reply[0], json.dumps(reply[1]).encode())
                    return
            elif self._refused(body):
                return
            if judge.capacity is not None and inside > judge.capacity:
                judge.count(judge.faults, "over capacity")
                self._send(429, error_body("too many requests"), {"Retry-After": "0.02"})
                return
            fault = judge.fault(prompt, nth)
            if fault in ODD_REPLIES:
                judge.count(judge.faults, fault)
                self._send(200, odd(fault, completion(judge.notify(prompt), body)))
                judge.count(judge.answered, prompt)
                return
            if fault is not None:
                judge.count(judge.faults, fault)
                self._misbehave(fault, prompt, body)
                return
            self._send(200, completion(judge.notify(prompt), body))
            judge.count(judge.answered, prompt)
        finally:
            judge.leave()

    def _read(self) -> bytes:
        """Return the body of a request, in chunks or in one."""
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _batched(self, data: bytes) -> bool:
        judge = self.server.judge
        if judge.batches is None or not self.path.startswith(("/v1/files", "/v1/batches")):
            return False
        with judge.lock:
            reply = judge.batches.handle(judge, self.command, self.path, self.headers, data)
        self._send(*reply)
        return True

    def _refused(self, body: dict[str, Any]) -> bool:
        judge = self.server.judge
        if self.path != "/v1/chat/completions":
            self._send(404, error_body("no such path"))
        elif judge.key is not None and self.headers["Authorization"] != f"Bearer {judge.key}":
            given = str(self.headers["Authorization"]).removeprefix("Bearer ")
            self._send(401, error_body(f"Incorrect API key provided: {given}"))
        elif judge.models is not None and body["model"] not in judge.models:
            self._send(404, error_body(f"The model {body['model']} does not exist"))
        elif rejected := [name for name in judge.rejects if name in body]:
            message = f"Unsupported parameter: '{rejected[0]}' is not supported with this model."
            if rejected[0] == "max_tokens":
                message += " Use 'max_completion_tokens' instead."
            self._send(400, error_body(message, param=rejected[0], code="unsupported_parameter"))
        else:
            return False
        return True

    def _misbehave(self, fault: str, prompt: str, body: dict[str, Any]) -> None:
        answer = json.dumps(completion(self.server.judge.notify(prompt), body)).encode()
        limited = error_body("Rate limit reached", code="rate_limit_exceeded")
        soon = format_datetime(datetime.now(UTC) + timedelta(seconds=0.05), usegmt=True)
        plain: dict[str, tuple[int, Any, dict[str, str]]] = {
            "429 seconds": (429, limited, {"Retry-After": "0.02"}),
            "429 milliseconds": (429, limited, {"Retry-After-Ms": "10"}),
            "429 date": (429, limited, {"Retry-After": soon}),
            "429 bare": (429, limited, {}),
            "429 tomorrow": (429, limited, {"Retry-After": "86400"}),
            "429 quota": (
                429,
                error_body("You exceeded your quota", code="insufficient_quota"),
                {},
            ),
            "400": (400, error_body("this model's context is too short"), {}),
            "403": (403, error_body("your country is not supported"), {}),
            "500": (500, error_body("the server had an error"), {}),
            "503 retry-after": (503, error_body("overloaded"), {"Retry-After": "0.02"}),
            "truncated json": (200, answer[: len(answer) // 2], {}),
            "garbage": (200, b"<html>502 Bad Gateway</html>", {}),
            "no choices": (200, {"choices": []}, {}),
            "error body": (200, {"error": {"message": "upstream failed", "code": 502}}, {}),
            "401": (401, error_body("Incorrect API key provided"), {}),
            "404": (404, error_body("not found"), {}),
            "402": (402, error_body("Insufficient credits"), {}),
            "filter": (
                400,
                error_body(
                    "The prompt triggered the content management policy", code="content_filter"
                ),
                {},
            ),
            "403 flagged": (
                403,
                {"error": {"message": "Your input was flagged", "code": 403, "metadata": {}}},
                {},
            ),
            **_bodies(answer, limited),
        }
        if fault in plain:
            self._send(*plain[fault])
        elif fault == "hang":
            self.server.judge.closing.wait(60)
            self.close_connection = True
        else:
            if fault == "reset mid-body":
                self._send(200, answer, cut=len(answer) // 2)
                time.sleep(0.005)
            self._reset()

    def _send(
        self,
        status: int,
        body: dict[str, Any] | bytes,
        headers: dict[str, str] | None = None,
        *,
        cut: int | None = None,
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[:cut])
        self.wfile.flush()

    def _reset(self) -> None:
        """Drop the connection the rude way (RST)."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


def _bodies(answer: bytes, limited: dict[str, Any]) -> dict[str, tuple[int, Any, dict[str, str]]]:
    """Return status, body and headers of the rarer faults."""
    failed = {"message": "upstream failed", "code": 502}
    gzip = {"Content-Encoding": "gzip"}
    return {
        **{str(status): (status, error_body("try again"), {}) for status in (408, 409, 425)},
        "502 page": (502, b"<html><h1>Bad Gateway</h1></html>", {}),
        "503 list": (503, b'[{"error": {"code": 503, "message": "overloaded"}}]', {}),
        "504 string": (504, b'"gateway time-out"', {}),
        "520 empty": (520, b"", {}),
        "529 detail": (529, {"detail": [{"loc": ["body"], "msg": "busy"}]}, {}),
        "429 list": (429, json.dumps([limited]).encode(), {"Retry-After": "0.02"}),
        "429 string": (429, {"code": "rate", "error": "too many"}, {"Retry-After": "0.02"}),
        "429 inside": (
            429,
            {"error": {"message": "Provider returned error", "metadata": {"raw": "slow down"}}},
            {"Retry-After": "0.02"},
        ),
        "200 with 502": (200, {"error": failed, "choices": None}, {}),
        "200 with 429": (200, {"error": {"message": "slow down", "code": 429}}, {}),
        "200 detail": (200, {"detail": "internal error"}, {}),
        "200 choice error": (200, {"choices": [{"error": failed, "finish_reason": "error"}]}, {}),
        "200 error text": (200, {"error": "upstream failed"}, {}),
        "empty": (200, b"", {}),
        "null": (200, b"null", {}),
        "list": (200, b"[1, 2]", {}),
        "string": (200, b'"75"', {}),
        "number": (200, b"75", {}),
        "deep": (200, b"[" * 100_000, {}),
        "deep object": (200, b'{"choices":' * 100_000, {}),
        "digits": (200, b'{"choices": [], "id": ' + b"9" * 6000 + b"}", {}),
        "not utf-8": (200, b'{"choices": "\xff\xfe"}', {}),
        "choices null": (200, {"choices": None}, {}),
        "choices text": (200, {"choices": "75"}, {}),
        "choice null": (200, {"choices": [None]}, {}),
        "message null": (200, {"choices": [{"message": None}]}, {}),
        "entries text": (
            200,
            {"choices": [{"message": {"content": "75"}, "logprobs": {"content": "75"}}]},
            {},
        ),
        "bomb": (200, _bomb(), gzip),
        "too long": (200, _TOO_LONG, {}),
        "bad gzip": (200, answer, gzip),
        "brotli": (200, answer, {"Content-Encoding": "br"}),
    }


_TOO_LONG = b" " * (6 * 2**20)


@functools.cache
def _bomb() -> bytes:
    """Return 64 MiB of spaces in 64 KiB of gzip."""
    return gzip_bytes(b" " * 2**26)


def odd(kind: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return a completion with something wrong in it that does not keep it from being read."""
    usage: dict[str, Any] = {
        "usage null": None,
        "usage huge": {"prompt_tokens": 10**400, "completion_tokens": 1},
        "usage negative": {"prompt_tokens": -5, "completion_tokens": 1},
        "usage text": {"prompt_tokens": "5", "completion_tokens": "1"},
    }
    choice = body["choices"][0]
    entry: dict[str, Any] = {"token": "hm", "logprob": -0.5}
    if kind in usage:
        body["usage"] = usage[kind]
    elif kind == "usage absent":
        del body["usage"]
    elif kind == "content parts":
        choice["message"]["content"] = [{"type": "text", "text": choice["message"]["content"]}]
    elif kind == "no finish reason":
        choice["finish_reason"] = None
    elif kind == "token of 6000 digits":
        entry = {"token": "9" * 6000, "logprob": -20.0}
    else:
        entry["logprob"] = {"null": None}.get(kind.split()[1], kind.split()[1])
        if entry["logprob"] is not None:
            entry["logprob"] = float(entry["logprob"])
    if kind.startswith(("logprob", "token")):
        choice["logprobs"]["content"][0]["top_logprobs"].append(entry)
    return body


def error_body(message: str, **fields: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "error", "param": None, "code": None, **fields}}


def completion(said: Said, body: dict[str, Any]) -> dict[str, Any]:
    """Return the chat completion that says ``said``, cut at the request's token limit."""
    limit = body.get("max_tokens", body.get("max_completion_tokens", 1000))
    tokens = list(said.tokens or [said.text])
    shown = tokens[:limit]
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": "".join(shown), "refusal": said.refusal},
        "finish_reason": "length" if len(shown) < len(tokens) else said.finish_reason,
        "logprobs": None,
    }
    if said.logprobs and body.get("logprobs"):
        choice["logprobs"] = {"content": _logprobs(shown, said.first, body["top_logprobs"])}
    words = len(re.findall(r"\S+", body["messages"][-1]["content"]))
    usage = {"prompt_tokens": words, "completion_tokens": len(shown)}
    return {"object": "chat.completion", "choices": [choice], "usage": usage}


def _logprobs(
    tokens: Sequence[str], first: dict[str, float] | None, count: int
) -> list[dict[str, Any]]:
    entries = []
    for index, token in enumerate(tokens):
        spread = first if index == 0 and first is not None else {token: 1.0}
        top = sorted(spread.items(), key=lambda pair: -pair[1])[:count]
        ranked = [{"token": word, "logprob": math.log(p)} for word, p in top if p > 0]
        own = math.log(spread.get(token, 1e-9))
        entries.append({"token": token, "logprob": own, "top_logprobs": ranked})
    return entries
