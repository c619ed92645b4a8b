"""A Hugging Face Hub on this machine, which huggingface_hub asks for models and data sets, and to upload a model."""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class Hub:
    """Repositories by name: revision -> files; `gated` ones are refused.

    Attributes:
        uploaded: repository -> file -> content, of commits.
        cut: file whose first download ends after this share of it. failing: files whose downloads fail.
        ranges: the Range headers of downloads. requests: method and path of every request.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.uploaded: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.cut: dict[str, float] = {}
        self.failing: set[str] = set()
        self.ranges: list[str] = []
        self.requests: list[str] = []

    def add(self, repo: str, folder: Path, revision: str = "main") -> None:
        files = {p.name: p.read_bytes() for p in folder.iterdir()}
        self.repos.setdefault(repo, {})[COMMITS[revision]] = files

    def files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        return self.repos.get(repo, {}).get(COMMITS.get(revision, revision))

    @contextmanager
    def reached(self, patch: pytest.MonkeyPatch, folder: Path) -> Iterator[str]:
        """Serve, and let huggingface_hub talk to this hub with a cache in `folder`; yield the address."""
        constants = importlib.import_module("huggingface_hub.constants")
        with self.serve() as address:
            settings = dict(ENDPOINT=address, HF_HUB_OFFLINE=False, HF_HUB_CACHE=str(folder / "cache"))
            settings |= dict(DOWNLOAD_CHUNK_SIZE=16384, HF_HUB_DISABLE_XET=True, HF_TOKEN_PATH=str(folder / "token"))
            settings |= dict(HUGGINGFACE_CO_URL_TEMPLATE=address + "/{repo_id}/resolve/{revision}/{filename}")
            for name, value in settings.items():
                patch.setattr(constants, name, value)
            patch.setenv("HF_TOKEN", "a-token")
            yield address

    @contextmanager
    def serve(self) -> Iterator[str]:
        """Serve on a free port; yield the address."""
        handler = type("Bound", (Handler,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answers one request; `hub` is set in serve()."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, content: bytes | dict[str, Any] | list[Any] = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, repo: str, revision: str) -> bool:
        if repo in self.hub.gated:
            self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access to this model is restricted.")
        elif repo not in self.hub.repos:
            self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif self.hub.files(repo, revision) is None:
            self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
        else:
            return False
        return True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        parts = path.strip("/").removeprefix("datasets/").split("/")
        if parts[0] == "api" and parts[1:2] in (["models"], ["datasets"]):
            repo, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
            if self.refuse(repo, revision):
                return
            files, commit = self.hub.files(repo, revision) or {}, COMMITS.get(revision, revision)
            if parts[4:5] == ["tree"]:
                self.answer(200, [{"type": "file", "path": n, "size": len(c), "oid": oid(c)} for n, c in files.items()])
            else:
                siblings = [{"rfilename": name} for name in files]
                self.answer(200, {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "private": False})
        elif parts[2:3] == ["resolve"]:
            self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        elif path == "/api/whoami-v2":
            self.answer(200, {"type": "user", "name": "someone", "orgs": []})
        else:
            self.answer(404)

    def resolve(self, repo: str, revision: str, name: str) -> None:
        if self.refuse(repo, revision):
            return
        content = (self.hub.files(repo, revision) or {}).get(name)
        commit = COMMITS.get(revision, revision)
        if content is None:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        headers = {"ETag": f'"{oid(content)}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        asked = self.headers.get("Range")
        if self.command == "HEAD":
            self.answer(200, content, **headers)
            return
        if name in self.hub.failing:
            self.answer(410)
            return
        first = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        if asked and first:
            self.hub.ranges.append(asked)
            headers["Content_Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        if name in self.hub.cut:
            headers["Content_Length"] = str(len(content))
            content = content[: int(len(content) * self.hub.cut.pop(name))]
            self.answer(200, content, **headers)
            self.close_connection = True
            self.connection.close()
            return
        self.answer(206 if asked and first else 200, content[first:], **headers)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"POST {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or 'someone'}/{given['name']}"
            self.hub.private[name] = given.get("visibility") == "private" or given.get("private") is True
            self.answer(200, {"url": f"http://127.0.0.1/{name}", "id": name, "name": name})
        elif parts[-2] == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            self.answer(200, {"files": [f | {"shouldIgnore": False} for f in files]})
        elif parts[-2] == "commit":
            repo = "/".join(parts[2:4])
            files = self.hub.uploaded.setdefault(repo, {})
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://127.0.0.1/{repo}/commit/{COMMITS['main']}"
            self.answer(200, {"success": True, "commitOid": COMMITS["main"], "commitUrl": url, "hookOutput": ""})
        else:
            self.answer(200, {})


def oid(content: bytes) -> str:
    """Return git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
