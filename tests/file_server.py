"""Local web server whose faults a test selects."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ETAG = '"one"'


@dataclass
class Answer:
    """Answer to one request; the default is that of a correct server."""

    status: int | None = None  # nothing but this status
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # send so many bytes, then hang up
    stall: bool = False  # after these bytes, wait
    length: int | None = None  # announce so many
    ignore_range: bool = False
    chunked: bool = False
    body: bytes | None = None


class FileServer(ThreadingHTTPServer):
    """Files of the server by path, the answers to the next requests in order, and the headers of past requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.answers: list[Answer] = []
        self.requests: list[dict[str, str]] = []
        self.tags = {"ETag": ETAG}
        self.go_on = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        server: FileServer = self.server
        server.requests.append(dict(self.headers))
        answer = server.answers.pop(0) if server.answers else Answer()
        body = server.files.get(self.path) if answer.body is None else answer.body
        status = answer.status or (200 if body is not None else 404)
        self.close_connection = True
        if answer.status or body is None:
            return self.answer(status, {"Content-Length": "0", **answer.headers})
        headers = {**server.tags, **answer.headers}
        start = 0
        if "Range" in self.headers and not answer.ignore_range and self.headers["If-Range"] in headers.values():
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                return self.answer(416, {"Content-Range": f"bytes */{len(body)}", "Content-Length": "0"})
            status = 206
            headers = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}", **headers}
        body = body[start:]
        if answer.chunked:
            headers["Transfer-Encoding"] = "chunked"
            body = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
        elif answer.length != -1:
            headers["Content-Length"] = str(len(body) if answer.length is None else answer.length)
        self.answer(status, headers)
        self.wfile.write(body[: answer.cut])
        if answer.stall:
            self.wfile.flush()
            server.go_on.wait(20)

    def answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


@contextmanager
def running() -> Iterator[FileServer]:
    """Run the server in its own thread."""
    server = FileServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join()
