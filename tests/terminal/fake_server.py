"""A server that writes what it is told to, and notes what it was sent."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeServer(ThreadingHTTPServer):
    """``pieces`` are an answer's; ``error`` comes instead; a server that is ``cut`` closes before the end."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.pieces: Sequence[str] = ("Hello ", "there.")
        self.error: dict[str, Any] = {}
        self.cut = False


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        self.server.keys.append(self.headers["Authorization"])
        self._send(200, "application/json", json.dumps({"data": [{"id": "m", "owned_by": "somebody"}]}))

    def do_POST(self) -> None:
        server = self.server
        server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if server.error:
            self._send(503, "application/json", json.dumps({"error": server.error}))
            return
        is_chat = "messages" in server.bodies[-1]
        choices = [{"delta": {"content": piece}} if is_chat else {"text": piece} for piece in server.pieces]
        chunks = [f"data: {json.dumps({'choices': [choice]})}\n\n" for choice in choices]
        self._send(200, "text/event-stream", "".join(chunks) + ("" if server.cut else "data: [DONE]\n\n"))

    def _send(self, status: int, kind: str, content: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
