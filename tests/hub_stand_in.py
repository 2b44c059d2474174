"""A stand-in for the Hugging Face hub, as far as uploading a model needs it, on this machine.

Repositories and branches are made (a branch begins as main's copy), files are listed and asked
about (`preupload`), large ones sent by git-lfs' batch API
(https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md) and kept by their hash, commits
make names visible or take them away. `sent` lists every upload in order. After `cut_after` uploads
the connection is cut in the middle of the next one, until it is None again.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

# Bytes, from which on a file goes by git-lfs: low, so that a tiny model has several.
LARGE = 4000
WRITER, READER = "hf_writer_secret", "hf_reader_secret"


class Hub:
    """The hub's state and its server; use as a context manager."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.stored: dict[str, bytes] = {}
        self.sent: list[str] = []
        self.asked: list[str] = []
        self.cut_after: int | None = None
        self.server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self})
        )
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.server.shutdown()
        self.server.server_close()

    def content(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """The files of a branch, as somebody who downloads them gets them."""
        files: dict[str, Any] = self.repos[repo]["branches"][branch]
        return {name: self.stored[f] if isinstance(f, str) else f for name, f in files.items()}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, code: str | None = None) -> None:
        data = b'{"error": "refused"}'
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_PUT(self) -> None:
        oid, length = self.path.rsplit("/", 1)[1], int(self.headers["Content-Length"])
        hub = self.hub
        if hub.cut_after is not None and len(hub.sent) >= hub.cut_after:
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        content = self.rfile.read(length)
        assert hashlib.sha256(content).hexdigest() == oid
        hub.sent.append(oid)
        hub.stored[oid] = content
        self.answer({})

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append(self.path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif token not in (WRITER, READER):
            self.refuse(401)
        elif token == READER:
            self.refuse(403)
        elif self.path == "/api/repos/create":
            self.create(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", self.path):
            self.info(match[1])
        elif match := re.match(r"/(?:api/models/)?([^/]+/[^/.]+)(?:\.git/info)?/(.*)", self.path):
            self.about(match[1], match[2].split("?")[0], body)
        else:
            self.refuse(404)

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if name in self.hub.repos:
            self.answer({"url": f"{self.hub.url}/{name}", "error": "exists"}, 409)
            return
        visible = not (wanted.get("private") or wanted.get("visibility") == "private")
        self.hub.repos[name] = {"public": visible, "branches": {"main": {}}}
        self.answer({"url": f"{self.hub.url}/{name}", "name": name})

    def info(self, name: str) -> None:
        if repo := self.hub.repos.get(name):
            self.answer({"id": name, "private": not repo["public"]})
        else:
            self.refuse(404, "RepoNotFound")

    def about(self, name: str, what: str, body: bytes) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            self.refuse(404, "RepoNotFound")
            return
        verb, _, branch = what.partition("/")
        if verb == "branch":
            repo["branches"].setdefault(branch, dict(repo["branches"]["main"]))
            self.answer({})
        elif verb == "lfs":
            self.answer({"transfer": "basic", "objects": self.batch(json.loads(body))})
        elif branch not in repo["branches"]:
            self.refuse(404, "RevisionNotFound")
        elif verb == "tree":
            files = repo["branches"][branch]
            self.answer([{"type": "file", "path": n, "size": 1, "oid": "0"} for n in files])
        elif verb == "preupload":
            asked = json.loads(body)["files"]
            self.answer({"files": [self.mode(f) for f in asked]})
        elif verb == "commit":
            self.commit(name, repo["branches"][branch], body)
        else:
            self.refuse(404)

    def mode(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {
            "path": asked["path"],
            "uploadMode": "lfs" if asked["size"] >= LARGE else "regular",
            "shouldIgnore": False,
            "oid": None,
        }

    def batch(self, wanted: dict[str, Any]) -> list[dict[str, Any]]:
        made = []
        for item in wanted["objects"]:
            there = item["oid"] in self.hub.stored
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            made.append({**item, **({} if there else {"actions": upload})})
        return made

    def commit(self, name: str, files: dict[str, Any], body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                assert value["oid"] in self.hub.stored
                files[value["path"]] = value["oid"]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        oid = hashlib.sha1(body).hexdigest()
        self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})
