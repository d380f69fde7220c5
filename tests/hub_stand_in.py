"""A stand-in for the Hugging Face hub on this machine: makes repositories, takes commits."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What was sent to it."""

    address: str = ""
    repos: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options of the repositories that were made, by name."""
    files: dict[str, bytes] = field(default_factory=dict)
    """By `owner/name@branch:path`."""
    commits: list[str] = field(default_factory=list)
    """First lines of their messages."""
    branches: list[str] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)
    """Uploaded apart, by SHA-256."""
    refuses: int = 0
    """A status to answer every request with, if any."""


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve on a free port."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        """Answers as the hub's interface does."""

        def log_message(self, *_: Any) -> None:
            pass

        def do_PUT(self) -> None:
            hub.large[self.path.rpartition("/")[2]] = self._body()
            self._answer({})

        def do_GET(self) -> None:
            self._answer({"auth": {}}, hub.refuses or 200)

        def do_POST(self) -> None:
            body = self._body()
            if hub.refuses:
                self._answer({"error": "no"}, hub.refuses)
                return
            parts = self.path.strip("/").split("/")
            if self.path == "/api/validate-yaml":
                self._answer({"warnings": [], "errors": []})
            elif self.path == "/api/repos/create":
                made = json.loads(body)
                name = f"{made['organization']}/{made['name']}"
                hub.repos[name] = made
                self._answer({"url": f"{hub.address}/{name}"})
            elif parts[4:5] == ["branch"]:
                hub.branches.append(parts[5])
                self._answer({})
            elif parts[4:5] == ["preupload"]:
                asked = json.loads(body)["files"]
                self._answer({"files": [_mode(one["path"]) for one in asked]})
            elif self.path.endswith("/info/lfs/objects/batch"):
                wanted = json.loads(body)["objects"]
                self._answer({"objects": [self._to_upload(**one) for one in wanted]})
            elif parts[4:5] == ["commit"]:
                self._commit("/".join(parts[2:4]), parts[5], body)
            else:
                self._answer({"error": self.path}, 404)

        def _to_upload(self, oid: str, size: int) -> dict[str, Any]:
            actions = {"upload": {"href": f"{hub.address}/lfs/{oid}"}}
            return {"oid": oid, "size": size, "actions": actions}

        def _commit(self, repo: str, branch: str, body: bytes) -> None:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    hub.commits.append(value["summary"])
                    continue
                large = line["key"] == "lfsFile"
                content = hub.large[value["oid"]] if large else base64.b64decode(value["content"])
                hub.files[f"{repo}@{branch}:{value['path']}"] = content
            url = f"{hub.address}/{repo}/commit/{'0' * 40}"
            self._answer({"success": True, "commitUrl": url, "commitOid": "0" * 40})

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers["Content-Length"] or 0))

        def _answer(self, data: Any, status: int = 200) -> None:
            content = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _mode(path: str) -> dict[str, Any]:
    mode = "lfs" if path.endswith(".safetensors") else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False}
