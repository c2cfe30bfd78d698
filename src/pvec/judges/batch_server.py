"""The batch endpoint of an OpenAI-compatible server: requests up, state, results down."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pvec.closing import Closing
from pvec.errors import JudgeError
from pvec.judges.reply import MalformedReply, parse_body, parse_error
from pvec.judges.server import MAX_REPLY_BYTES, Server
from pvec.runs.files import store_error

ENDPOINT: Final = "/v1/chat/completions"
_WINDOW: Final = "24h"  # the only one there is
_MOST_RESULTS = 4 * 2**30
"""Bytes of one file of results: more than 50,000 replies ever take."""

_ENDED = ("completed", "failed", "expired", "cancelled")


@dataclass(frozen=True, kw_only=True)
class BatchState:
    """What the server says of a batch. ``done`` of ``total`` requests were answered; ``files`` hold
    the results; ``problem`` and ``codes`` say why it failed.
    """

    id: str
    status: str
    done: int = 0
    total: int = 0
    files: tuple[str, ...] = ()
    problem: str = ""
    codes: tuple[str, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.status in _ENDED

    @property
    def over_quota(self) -> bool:
        """Whether the account has too many tokens waiting in batches for this one."""
        return self.status == "failed" and "token_limit_exceeded" in self.codes


class Gone(Exception):  # noqa: N818 - an answer, not a fault
    """The server does not know this batch or file."""


class BatchServer(Closing):
    """The batches of ``server``, asked with its key; a context manager. ``tries`` is how often a
    request is sent when the server fails or the connection does.

    Every method raises ``JudgeError`` when the server cannot be used.
    """

    def __init__(self, server: Server, *, tries: int) -> None:
        from openai import DefaultHttpxClient, OpenAI

        self._server = server
        self._client = OpenAI(
            **server.access(),
            max_retries=tries - 1,
            http_client=DefaultHttpxClient(follow_redirects=False),
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def check(self) -> None:
        """Find out whether the server has batches."""
        try:
            with self._explained():
                self._client.batches.with_raw_response.list(limit=1)
        except Gone:
            raise JudgeError(
                f"The server at {self._server.place} has no batch endpoint (/batches): omit "
                "--judge-batch, or use a server that has one (--judge-url)."
            ) from None

    def submit(self, requests: Path, *, key: str) -> BatchState:
        """Send a file of requests and have it worked through; ``key`` finds the batch again."""
        with self._lasting(), self._explained(), requests.open("rb") as stream:
            raw = self._client.files.with_raw_response.create(file=stream, purpose="batch")
            uploaded = _text_of(parse_body(raw.http_response.content), "id")
            created = self._client.batches.with_raw_response.create(
                input_file_id=uploaded,
                endpoint=ENDPOINT,
                completion_window=_WINDOW,
                metadata={"pvec": key},
            )
            return _state(parse_body(created.http_response.content), self._server)

    def find(self, key: str) -> BatchState | None:
        """Return the batch that was submitted with ``key``, among the last hundred, or None."""
        with self._lasting(), self._explained():
            raw = self._client.batches.with_raw_response.list(limit=100)
            listed = parse_body(raw.http_response.content).get("data")
            for body in listed if isinstance(listed, list) else ():
                if isinstance(body, dict) and (body.get("metadata") or {}).get("pvec") == key:
                    return _state(body, self._server)
        return None

    def state(self, identity: str) -> BatchState:
        """Return how far a batch is. Raises ``Gone`` when the server does not know it."""
        with self._explained():
            raw = self._client.batches.with_raw_response.retrieve(identity)
            return _state(parse_body(raw.http_response.content), self._server)

    def download(self, file: str, target: Path) -> None:
        """Write a file of the server to ``target``. Raises ``Gone`` when it is no longer there."""
        for left in reversed(range(self._client.max_retries + 1)):
            try:
                with self._explained():
                    self._stream(file, target)
                return
            except JudgeError:  # a connection that dropped half-way is not tried again by itself
                if not left:
                    raise

    def _stream(self, file: str, target: Path) -> None:
        size = 0
        try:
            with (
                self._client.files.with_streaming_response.content(file) as response,
                target.open("wb") as stream,
            ):
                for chunk in response.iter_bytes():
                    size += stream.write(chunk)
                    if size > _MOST_RESULTS:
                        raise MalformedReply("its results are longer than any batch's")
        except OSError as error:
            if error.errno is None:  # a connection's
                raise
            raise store_error(target, error) from error

    @contextlib.contextmanager
    def _lasting(self) -> Iterator[None]:
        try:
            yield
        except Gone as error:
            raise JudgeError(self._failed(str(error))) from None

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what the client raises into ``Gone`` or one sentence, without the key."""
        from openai import APIConnectionError, APIStatusError, OpenAIError

        host = self._server.host
        try:
            yield
        except APIStatusError as error:
            reply, status = parse_error(error.response.content), error.status_code
            reason = self._server.redact(f"HTTP {status}: {reply.message}".removesuffix(": "))
            if status in (404, 405):
                raise Gone(reason) from None
            if status in (401, 403):
                raise JudgeError(
                    f"The judge at {host} refused the key for its batch endpoint ({reason}): set a "
                    f"valid key in {self._server.key_name}, or omit --judge-batch."
                ) from None
            if status == 402 or "insufficient_quota" in reply.text:
                raise JudgeError(
                    f"The account at {host} has no credit left: add credit and run the same "
                    "command again, everything scored so far is kept."
                ) from None
            raise JudgeError(self._failed(reason)) from None
        except (APIConnectionError, TimeoutError, ConnectionError) as error:
            reason = self._server.redact(f"the connection failed: {error.__cause__ or error}")
            raise JudgeError(self._failed(reason)) from None
        except (MalformedReply, OpenAIError) as error:
            raise JudgeError(self._failed(self._server.redact(str(error)))) from None
        except Exception as error:
            # The HTTP library of the client is the client's own affair: it has had two names.
            if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2"):
                raise
            reason = self._server.redact(f"the connection failed: {error}")
            raise JudgeError(self._failed(reason)) from None

    def _failed(self, reason: str) -> str:
        return (
            f"The batch endpoint of the judge at {self._server.host} failed ({reason}): run the "
            "same command again, a batch that was submitted goes on at the server."
        )


def read_results(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file of results that are JSON objects; others are left out."""
    with path.open("rb") as stream:
        while line := stream.readline(MAX_REPLY_BYTES):
            with contextlib.suppress(MalformedReply):
                yield parse_body(line)


def _state(body: Mapping[str, Any], server: Server) -> BatchState:
    counts = body.get("request_counts")
    counts = counts if isinstance(counts, dict) else {}
    listed = (body.get("errors") or {}).get("data") if isinstance(body.get("errors"), dict) else []
    errors = [error for error in listed or () if isinstance(error, dict)]
    first = errors[0] if errors else {}
    line = f"line {first['line']}: " if isinstance(first.get("line"), int) else ""
    files = (body.get("output_file_id"), body.get("error_file_id"))
    return BatchState(
        id=_text_of(body, "id"),
        status=_text_of(body, "status"),
        done=_count(counts, "completed"),
        total=_count(counts, "total"),
        files=tuple(file for file in files if isinstance(file, str) and file),
        problem=server.redact(f"{line}{first.get('message') or 'no reason given'}"),
        codes=tuple(str(error.get("code")) for error in errors),
    )


def _text_of(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise MalformedReply(f"the server's reply has no {name}")
    return value


def _count(counts: Mapping[str, Any], name: str) -> int:
    value = counts.get(name)
    return value if type(value) is int else 0
