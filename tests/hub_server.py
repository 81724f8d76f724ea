"""The few endpoints of the Hugging Face Hub that huggingface_hub uses to download, over HTTP on this machine."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Commits (40 hexadecimal digits) -> their files; branches and tags -> commits."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    token: str | None = None

    def commit(self, files: dict[str, bytes], *names: str) -> str:
        """Add a commit; ``main`` and the names now mean it."""
        digest = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[digest] = files
        self.names |= dict.fromkeys(("main", *names), digest)
        return digest


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass
class Hub:
    """What is served, every request: (method, path), and the bytes served of each file.

    ``ranges``: whether requests for parts of a file are answered by that part.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    served: Counter[str] = field(default_factory=Counter)
    broken: bool = False
    ranges: bool = True
    url: str = ""

    def downloaded(self) -> set[str]:
        """Names of the files whose bytes were asked for."""
        return {path.split("/", 5)[5] for method, path in self.requests if method == "GET" and "/resolve/" in path}

    def answer(self, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body)"""
        if self.broken:
            return 503, {}, b""
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        name = (found or file or [None, ""])[1]
        repository = self.repositories.get(name)
        if repository is None or repository.token not in (None, token):
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        revision = (found and found[3]) or (file and file[2]) or "main"
        sha = repository.names.get(revision, revision)
        if sha not in repository.commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = repository.commits[sha]
        if found and found[2] == "tree":
            entries = [{"type": "file", "path": p, "size": len(b), "oid": _digest(b)} for p, b in files.items()]
            return 200, {}, json.dumps(entries).encode()
        if found:
            siblings = [{"rfilename": path} for path in files]
            return 200, {}, json.dumps({"id": name, "modelId": name, "sha": sha, "siblings": siblings}).encode()
        if repository.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        content = files.get(file[3])
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}, b""
        return 200, {"X-Repo-Commit": sha, "ETag": f'"{_digest(content)}"'}, content


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            status, headers, body = hub.answer(path, token)
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            if status == 200 and wanted and hub.ranges:
                start, stop, size = int(wanted[1]), int(wanted[2]) + 1, len(body)
                body = body[start:stop]
                status, headers = 206, {**headers, "Content-Range": f"bytes {start}-{start + len(body) - 1}/{size}"}
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                hub.served[path.rpartition("/")[2]] += len(body)
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
