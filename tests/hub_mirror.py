"""A Hugging Face hub on loopback, serving data sets from a folder: a test fixture.

It answers what `datasets` asks of a hub when it streams: the revision of a repository, its tree,
information on paths, and files, whole or by range. The folder holds ``org/name/...`` with the
files of each repository; a repository without files does not exist, and one with a file
``.gated`` asks for a login.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class Mirror(ThreadingHTTPServer):
    """The server; ``requests`` lists what was asked, as (method, path). The next requests for
    files are answered by the statuses in ``orders``, and all of them by ``failing`` if it is set.
    """

    daemon_threads = True

    def __init__(self, root: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.root = root
        self.requests: list[tuple[str, str]] = []
        self.orders: list[int] = []
        self.failing: int | None = None
        self.connections: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def kill(self) -> None:
        """Break the connections that clients keep open."""
        for connection in self.connections:
            with suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repository: str) -> str:
        """The revision of a repository: a hash of its files' names and contents."""
        digest = hashlib.sha1()
        for path in self.files(repository):
            digest.update(str(path.relative_to(self.root)).encode() + path.read_bytes())
        return digest.hexdigest()

    def files(self, repository: str) -> list[Path]:
        return sorted(p for p in (self.root / repository).rglob("*") if p.is_file())


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Mirror

    def do_GET(self) -> None:
        self.server.requests.append((self.command, self.path))
        path = unquote(urlsplit(self.path).path).strip("/").split("/")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        api = path[0] == "api"
        if path[api : api + 1] != ["datasets"] or len(path) < api + 3:
            return self.refuse(404, "EntryNotFound")
        repository, rest = "/".join(path[api + 1 : api + 3]), path[api + 3 :]
        files = self.server.files(repository)
        if not files:
            return self.refuse(404, "RepoNotFound")
        if files[0].name == ".gated":
            return self.refuse(401, "GatedRepo")
        commit = self.server.commit(repository)
        verb, revision = (rest or ["revision", "main"])[:2]
        if revision not in ("main", commit):
            return self.refuse(404, "RevisionNotFound")
        inside = "/".join(rest[2:])
        if not api and verb == "resolve":
            return self.resolve(self.server.root / repository / inside, commit)
        entries = list(self.entries(self.server.root / repository))
        if verb == "revision":
            siblings = [{"rfilename": e["path"]} for e in entries if e["type"] == "file"]
            return self.send({"id": repository, "sha": commit, "siblings": siblings, "tags": []})
        if verb == "tree":
            deep = "true" in parse_qs(urlsplit(self.path).query.lower()).get("recursive", [])
            prefix = inside + "/" if inside else ""
            found = [e for e in entries if e["path"].startswith(prefix)]
            found = [e for e in found if deep or "/" not in e["path"][len(prefix) :]]
            return self.send(found) if found else self.refuse(404, "EntryNotFound")
        if verb == "paths-info":
            form = body.decode()
            wanted = json.loads(form)["paths"] if form.startswith("{") else parse_qs(form)["paths"]
            return self.send([e for e in entries if e["path"] in wanted])
        self.refuse(404, "EntryNotFound")

    do_HEAD = do_POST = do_GET

    def entries(self, root: Path) -> Iterator[dict[str, Any]]:
        for path in sorted(root.rglob("*")):
            oid = hashlib.sha1(str(path).encode()).hexdigest()
            kind = "file" if path.is_file() else "directory"
            size = path.stat().st_size if path.is_file() else 0
            yield {"type": kind, "oid": oid, "size": size, "path": str(path.relative_to(root))}

    def resolve(self, path: Path, commit: str) -> None:
        if not path.is_file():
            return self.refuse(404, "EntryNotFound")
        if self.command == "GET" and (self.server.orders or self.server.failing):
            refused = self.server.orders.pop(0) if self.server.orders else self.server.failing
            return self.send({}, refused or 500, {"Retry-After": "1"})
        data, status = path.read_bytes(), 200
        etag = hashlib.sha1(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data, status = data[start:stop], 206
        self.send(data, status, headers)

    def refuse(self, status: int, code: str) -> None:
        self.send({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code})

    def send(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the requests are kept in the server's list."""


@contextmanager
def serve(root: Path, port: int = 0) -> Iterator[Mirror]:
    """Serve ``root`` from a thread until the context ends."""
    with Mirror(root, port) as mirror:
        thread = threading.Thread(target=mirror.serve_forever, daemon=True)
        thread.start()
        try:
            yield mirror
        finally:
            mirror.shutdown()
            thread.join()
            mirror.kill()
