"""``/v1/files`` and ``/v1/batches`` of a ``JudgeServer``: uploads, batches, results, misfortunes.

A batch advances by one step each time it is looked at: validating, in progress, ended. What it
answers is what the server's chat endpoint would have answered to the same body.
"""

from __future__ import annotations

import email
import email.policy
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.helpers.judge_server import JudgeServer, completion, error_body

FATES = ("completed", "expired", "cancelled", "failed", "over quota")


@dataclass
class Batches:
    """The batches of a server. ``fate(n)`` is how the n-th batch ends; ``fault(prompt, nth)`` is
    what goes wrong with a request that was submitted ``nth`` times before: a status, ``"silent"``
    (not in any file), ``"expired"``, ``"filter"`` or None.
    """

    fate: Callable[[int], str] = lambda _: "completed"
    fault: Callable[[str, int], str | int | None] = lambda _prompt, _nth: None
    steps: int = 1
    """How often a batch is looked at before it has ended."""
    files: dict[str, bytes] = field(default_factory=dict)
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)
    inputs: list[list[dict[str, Any]]] = field(default_factory=list)
    submitted: Counter[str] = field(default_factory=Counter)
    looks: Counter[str] = field(default_factory=Counter)
    forgotten: set[str] = field(default_factory=set)
    """Ids of files and batches that the server no longer has."""
    broken: Callable[[str, str], int | None] = lambda _method, _path: None
    """A status that a request gets instead of an answer."""

    def handle(  # noqa: PLR0911 - a line per endpoint
        self, judge: JudgeServer, method: str, path: str, headers: Any, data: bytes
    ) -> tuple[int, Any]:
        """Return status and body of a request to one of the endpoints."""
        path = path.partition("?")[0].removeprefix("/v1/")
        status = self.broken(method, path)
        if status is not None:
            return status, error_body("something is wrong")
        if judge.key is not None and headers["Authorization"] != f"Bearer {judge.key}":
            given = str(headers["Authorization"])
            return 401, error_body(f"Incorrect API key provided: {given}")
        parts = path.split("/")
        if len(parts) > 1 and (parts[1] in self.forgotten or not self._knows(parts[1])):
            return 404, error_body(f"No such object: {parts[1]}")
        match method, parts:
            case "POST", ["files"]:
                return 200, self._upload(headers["Content-Type"], data)
            case "GET", ["files", name, "content"]:
                return 200, self.files[name]
            case "GET", ["batches"]:
                return 200, {"object": "list", "data": list(self.batches.values())[::-1]}
            case "POST", ["batches"]:
                return 200, self._create(judge, json.loads(data))
            case "GET", ["batches", name]:
                return 200, self._look(judge, name)
        return 404, error_body("no such path")

    def _knows(self, name: str) -> bool:
        return name in self.files or name in self.batches

    def _keep(self, content: bytes) -> str:
        name = f"file-{len(self.files)}"
        self.files[name] = content
        return name

    def _upload(self, kind: str, data: bytes) -> dict[str, Any]:
        head = f"Content-Type: {kind}\r\n\r\n".encode()
        form = email.message_from_bytes(head + data, policy=email.policy.HTTP)
        parts = {
            part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
            for part in form.iter_parts()  # type: ignore[attr-defined]
        }
        assert parts["purpose"] == b"batch"
        return {"id": self._keep(parts["file"]), "object": "file", "purpose": "batch"}

    def _create(self, judge: JudgeServer, body: dict[str, Any]) -> dict[str, Any]:
        assert (body["endpoint"], body["completion_window"]) == ("/v1/chat/completions", "24h")
        name = f"batch_{len(self.batches)}"
        lines = self.files[body["input_file_id"]].decode().splitlines()
        requests = [json.loads(line) for line in lines]
        for request in requests:
            assert set(request) == {"custom_id", "method", "url", "body"}
            assert (request["method"], request["url"]) == ("POST", body["endpoint"])
        assert len({request["custom_id"] for request in requests}) == len(requests)
        self.inputs.append(requests)
        self.batches[name] = {
            "id": name, "object": "batch", "status": "validating", **body,
            "created_at": 1, "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "output_file_id": None, "error_file_id": None, "errors": None,
        }  # fmt: skip
        return self.batches[name]

    def _look(self, judge: JudgeServer, name: str) -> dict[str, Any]:
        batch, requests = self.batches[name], self.inputs[int(name.partition("_")[2])]
        self.looks[name] += 1
        total = len(requests)
        if self.looks[name] <= self.steps:
            batch["status"] = "in_progress" if self.looks[name] > 1 else "validating"
            batch["request_counts"] = {"total": total, "completed": 0, "failed": 0}
        elif not batch.get("ended"):
            batch["ended"] = True
            self._end(judge, batch, requests)
        return batch

    def _end(
        self, judge: JudgeServer, batch: dict[str, Any], requests: list[dict[str, Any]]
    ) -> None:
        fate = self.fate(int(batch["id"].partition("_")[2]))
        batch["status"] = "failed" if fate == "over quota" else fate
        if batch["status"] == "failed":
            code = "token_limit_exceeded" if fate == "over quota" else "invalid_json_line"
            data = [{"code": code, "line": 3, "message": "no room for this", "param": None}]
            batch["errors"] = {"object": "list", "data": data}
            return
        stop = len(requests) if fate == "completed" else len(requests) // 2
        good, bad = [], []
        for place, request in enumerate(requests):
            line = self._answer(judge, request) if place < stop else self._expired(request, fate)
            if line is not None:
                (bad if line["error"] or line["response"]["status_code"] != 200 else good).append(
                    json.dumps(line)
                )
        batch["request_counts"] = {
            "total": len(requests), "completed": len(good), "failed": len(bad)
        }  # fmt: skip
        batch["output_file_id"] = self._keep("\n".join(good).encode()) if good else None
        batch["error_file_id"] = self._keep("\n".join(bad).encode()) if bad else None

    def _expired(self, request: dict[str, Any], fate: str) -> dict[str, Any] | None:
        if fate != "expired":
            return None
        error = {"code": "batch_expired", "message": "This request could not be executed in time."}
        return {"custom_id": request["custom_id"], "response": None, "error": error}

    def _answer(self, judge: JudgeServer, request: dict[str, Any]) -> dict[str, Any] | None:
        body = request["body"]
        prompt = body["messages"][-1]["content"]
        nth = self.submitted[prompt]
        self.submitted[prompt] += 1
        fault = self.fault(prompt, nth)
        if fault == "silent":
            return None
        if fault == "expired":
            return self._expired(request, "expired")
        status, reply = 200, completion(judge.notify(prompt), body)
        if fault == "filter":
            status, reply = 400, error_body("The prompt was flagged", code="content_filter")
        elif isinstance(fault, int):
            status, reply = fault, error_body("not this time")
        response = {"status_code": status, "request_id": "r", "body": reply}
        return {"id": "b", "custom_id": request["custom_id"], "response": response, "error": None}
