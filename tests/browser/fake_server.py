"""A server with the HTTP contract of ``pvec serve`` and answers that tests choose.

It serves the real page. Each answer is its words, one token each; the projection of word i on a
vector is ``i / 100`` plus the vector's coefficient.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "src" / "pvec" / "serve" / "page"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css",
         ".svg": "image/svg+xml"}  # fmt: skip


def vector(name: str) -> dict[str, Any]:
    return {
        "name": name, "trait": name, "layer": 3, "layers": [1, 2, 3, 4], "fingerprint": "0" * 16,
        "unit": "residual norms", "norm_ratio": 0.5, "negative": -0.1, "positive": 0.4,
    }  # fmt: skip


class FakeServer:
    """Runs in a thread. Change its attributes to change what the next request meets."""

    def __init__(self, port: int = 0) -> None:
        self.answer = "one two three four five six seven eight"
        self.key: str | None = None
        self.delay = 0.0
        self.break_after: int | None = None
        self.requests: list[dict[str, Any]] = []
        self.closed_early = 0
        self.facts: dict[str, Any] = {
            "model": "fake", "layers": 4, "vectors": [vector("evil"), vector("kind")],
            "max_coef": 3.0, "max_steer": 8, "presets": [], "fixed": False, "defaults": [],
            "policies": [],
        }  # fmt: skip
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

            def do_GET(self) -> None:
                fake._get(self)

            def do_POST(self) -> None:
                fake._post(self)

        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._http.daemon_threads = True
        self.port = self._http.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def words(self, steer: list[dict[str, Any]]) -> list[str]:
        return [f"{word} " for word in self.answer.split()] + [
            f"<{e.get('coef', 1):g}>" for e in steer
        ]

    def _get(self, http: BaseHTTPRequestHandler) -> None:
        path = http.path.partition("?")[0]
        if path == "/pvec/vectors":
            if self._admits(http):
                self._send(http, 200, json.dumps(self.facts).encode(), "application/json")
            return
        name = "index.html" if path == "/" else path.removeprefix("/page/")
        file = PAGE / name
        if "/" in name or not file.is_file():
            self._send(http, 404, b"{}", "application/json")
        else:
            self._send(http, 200, file.read_bytes(), TYPES[file.suffix])

    def _post(self, http: BaseHTTPRequestHandler) -> None:
        body = json.loads(http.rfile.read(int(http.headers["Content-Length"])))
        if not self._admits(http):
            return
        self.requests.append(body)
        steer = body["pvec"].get("steer", [])
        too_strong = [e for e in steer if abs(e.get("coef", 0)) > 3]
        if too_strong:
            self._error(http, 400, f"The coefficient {too_strong[0]['coef']} is above 3.")
            return
        http.send_response(200)
        http.send_header("Content-Type", "text/event-stream")
        http.end_headers()
        try:
            for event in self._events(steer):
                http.wfile.write(f"data: {event}\n\n".encode())
                http.wfile.flush()
                time.sleep(self.delay)
        except (BrokenPipeError, ConnectionResetError):
            self.closed_early += 1

    def _events(self, steer: list[dict[str, Any]]) -> Iterator[str]:
        names = [v["name"] for v in self.facts["vectors"]]
        coefs = {e["vector"]: e.get("coef", 0.0) for e in steer}
        yield _chunk({"role": "assistant", "content": ""})
        words = self.words(steer)
        for i, word in enumerate(words):
            if i == self.break_after:
                return
            values = {name: i / 100 + coefs.get(name, 0) for name in names}
            yield _chunk({"content": word}, tokens=[{"text": word, "projections": values}])
        mean = (len(words) - 1) / 200
        yield _chunk(
            {},
            finish="stop",
            vectors={
                name: {
                    "layer": 3, "prompt": 0.0, "answer": mean + coefs.get(name, 0),
                    "percentile": {"negative": 90.0, "positive": 12.5},
                }
                for name in names
            },
            steer=[_applied(entry) for entry in steer],
            touched=len(words),
        )  # fmt: skip
        yield "[DONE]"

    def _admits(self, http: BaseHTTPRequestHandler) -> bool:
        if self.key is None or http.headers["Authorization"] == f"Bearer {self.key}":
            return True
        self._error(http, 401, "This server needs its API key.")
        return False

    def _error(self, http: BaseHTTPRequestHandler, status: int, message: str) -> None:
        body = {"error": {"message": message, "type": "invalid_request_error"}}
        self._send(http, status, json.dumps(body).encode(), "application/json")

    def _send(self, http: BaseHTTPRequestHandler, status: int, body: bytes, kind: str) -> None:
        http.send_response(status)
        http.send_header("Content-Type", kind)
        http.send_header("Content-Length", str(len(body)))
        http.send_header("Content-Security-Policy", "default-src 'self'")
        http.end_headers()
        http.wfile.write(body)


def _applied(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry as the server reports it: complete, a ceiling in raw units."""
    full = {"layer": 3, "positions": "response", "operator": "add", "coef": 1.0, **entry}
    norm = 200 if full.pop("unit", "raw") == "norm" else 1
    return {**full, "coef": full["coef"] * norm}


def _chunk(delta: dict[str, str], *, finish: str | None = None, **pvec: object) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return json.dumps({"choices": [choice], **({"pvec": pvec} if pvec else {})})
