"""A network that breaks: a proxy that closes connections in the middle of a stream."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

STREAM = b"text/event-stream"


class CuttingProxy:
    """Hands on bytes, and cuts the first ``num_cuts`` streams after so many bytes each."""

    def __init__(self, port: int, num_cuts: int, after_bytes: int) -> None:
        self._port, self._after_bytes = port, after_bytes
        self.num_cuts_left = num_cuts
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(60)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._port))
            threading.Thread(target=self._forward, args=(client, server), daemon=True).start()
            threading.Thread(target=self._back, args=(client, server), daemon=True).start()

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)

    def _back(self, client: socket.socket, server: socket.socket) -> None:
        received = b""
        with client, server, suppress(OSError):
            while data := server.recv(512):
                received += data
                client.sendall(data)
                if self.num_cuts_left and STREAM in received and len(received) > self._after_bytes:
                    self.num_cuts_left -= 1
                    server.shutdown(socket.SHUT_RDWR)
                    client.shutdown(socket.SHUT_RDWR)
                    return
