"""A real HTTP server on loopback that speaks as much of the hub's API as vectors need.

Repositories are dictionaries from file name to bytes. Files that the hub would keep in large-file
storage go through it here too, so that a client runs the same requests as against the hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """The state of the hub, the token it accepts, and what was asked of it."""

    token: str = "hf_secretsecretsecret"
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def commit_of(self, repo: str) -> str:
        """Return 40 hex digits that change when the repository does."""
        digest = hashlib.sha1(usedforsecurity=False)
        for name, content in sorted(self.repos[repo].items()):
            digest.update(name.encode() + content)
        return digest.hexdigest()


class HubServer:
    """Serves ``hub`` while the context lasts; ``url`` is what HF_ENDPOINT should be."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = hub  # type: ignore[attr-defined]

    @property
    def url(self) -> str:
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        found: Hub = self.server.hub  # type: ignore[attr-defined]
        return found

    def log_message(self, *_: Any) -> None:
        """Stay silent."""

    def do_HEAD(self) -> None:
        self._resolve(body=False)

    def do_GET(self) -> None:
        path = self._path()
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._info(match[1], match[2] or "main")
        else:
            self._resolve(body=True)

    def do_PUT(self) -> None:
        content = self._body()
        self.hub.large[hashlib.sha256(content).hexdigest()] = content
        self._json({})

    def do_POST(self) -> None:
        path = self._path()
        body = self._body()
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._json({"error": "Invalid credentials"}, status=401)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            names = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [_upload_mode(name) for name in names]})
        elif match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            self._json(self._batch(json.loads(body)))
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            self._commit(match[1], body.decode())
        else:
            self._json({}, status=200 if path.endswith("verify") else 404)

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        return path

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
        status = 409 if name in self.hub.repos else 200
        self.hub.repos.setdefault(name, {})
        self.hub.private.setdefault(name, asked.get("visibility") == "private")
        self._json({"url": f"http://{self.headers['Host']}/{name}", "name": name}, status=status)

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        href = f"http://{self.headers['Host']}/large/"
        return {
            "transfer": "basic",
            "objects": [
                {**one, "actions": {"upload": {"href": href + one["oid"]}}}
                for one in asked["objects"]
            ],
        }

    def _commit(self, repo: str, lines: str) -> None:
        files = self.hub.repos[repo]
        for line in map(json.loads, lines.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        commit = self.hub.commit_of(repo)
        url = f"http://{self.headers['Host']}/{repo}/commit/{commit}"
        self._json({"commitUrl": url, "commitOid": commit, "success": True})

    def _info(self, repo: str, revision: str) -> None:
        if repo not in self.hub.repos:
            self._json({"error": "Not found"}, status=404, code="RepoNotFound")
        elif revision not in {"main", self.hub.commit_of(repo)}:
            self._json({"error": "Not found"}, status=404, code="RevisionNotFound")
        else:
            files = self.hub.repos[repo]
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            self._json(
                {"id": repo, "modelId": repo, "sha": self.hub.commit_of(repo), "siblings": siblings}
            )

    def _resolve(self, *, body: bool) -> None:
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self._path())
        if match is None or match[1] not in self.hub.repos:
            self._json({}, status=404, code="RepoNotFound")
            return
        content = self.hub.repos[match[1]].get(match[2])
        if content is None:
            self._json({}, status=404, code="EntryNotFound")
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.hub.commit_of(match[1]))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", "0")))

    def _json(self, value: dict[str, Any], *, status: int = 200, code: str | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _upload_mode(name: str) -> dict[str, Any]:
    mode = "lfs" if name.endswith(".safetensors") else "regular"
    return {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": None}
