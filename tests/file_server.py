"""A web server on loopback with byte ranges and folder pages, and faults to order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class FileServer(ThreadingHTTPServer):
    """Serves a folder. ``orders`` are carried out by the next requests for ranges: a status with
    headers, or ``cut`` to break the connection in the middle of the body."""

    daemon_threads = True

    def __init__(self, root: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.root = root
        self.orders: list[tuple[int, dict[str, str]] | str] = []
        self.ranges: list[tuple[str, int, int]] = []  # what was sent: path, first byte, last byte
        self.with_ranges = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        path = self.server.root / unquote(self.path).strip("/")
        if path.is_dir():
            links = "".join(f'<a href="{p.name}">{p.name}</a>' for p in sorted(path.iterdir()))
            return self.answer(200, {"Content-Type": "text/html"}, links.encode())
        if not path.is_file():
            return self.answer(404, {}, b"")
        data = path.read_bytes()
        asked = self.headers.get("Range", "")
        if not asked.startswith("bytes=") or not self.server.with_ranges:
            return self.answer(200, {"Accept-Ranges": "bytes"}, data)
        order = self.server.orders.pop(0) if self.server.orders else None
        if isinstance(order, tuple):
            return self.answer(order[0], order[1], b"")
        first, _, last = asked.removeprefix("bytes=").partition("-")
        begin, end = int(first), min(int(last or len(data)), len(data) - 1)
        self.server.ranges.append((path.name, begin, end))
        headers = {"Content-Range": f"bytes {begin}-{end}/{len(data)}"}
        body = data[begin : end + 1]
        self.answer(206, headers, body, sent=len(body) // 2 if order == "cut" else len(body))

    do_HEAD = do_GET

    def answer(
        self, status: int, headers: dict[str, str], body: bytes, sent: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])

    def log_message(self, format: str, *args: object) -> None:
        """Keep the tests' output clean."""


@contextmanager
def serve_files(root: Path, port: int = 0) -> Iterator[FileServer]:
    server = FileServer(root, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
