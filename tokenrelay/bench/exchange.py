"""One HTTP exchange over a connection of its own, with little work per chunk.

The client shares its cores with the server it measures. With asyncio's protocols, h11 and msgspec a streamed chunk
costs 60 µs, with httpx and json 500 (one core of an AMD EPYC).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import h11
import msgspec

from tokenrelay.bench.measured import TargetError


class RefusalError(Exception):
    """An answer other than 200, with what the server said."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a server is, from its URL with or without ``/v1``."""

    host: str
    port: int
    tls: bool
    prefix: str

    @property
    def authority(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def of(cls, url: str) -> Origin:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise TargetError(f"{url!r} is no target: give [NAME=]http://HOST:PORT or NAME=exec:COMMAND")
        tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, parts.port or (443 if tls else 80), tls, prefix)


class Exchange(asyncio.Protocol):
    """Sends one request; hands on the body of a 200 as it comes, and keeps that of anything else."""

    def __init__(self, request: bytes, receive: Callable[[bytes], None], connection: h11.Connection) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request, self._receive, self._connection = request, receive, connection
        self._status, self._refusal = 0, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        if self.ended.done():
            return
        try:
            self._connection.receive_data(data)
            while self._take(self._connection.next_event()):
                pass
        except (h11.RemoteProtocolError, msgspec.MsgspecError) as error:
            self.ended.set_exception(ConnectionError(f"not understood: {error}"))

    def eof_received(self) -> None:
        self.data_received(b"")

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(ConnectionError("the connection broke before the answer's end"))

    def _take(self, event: Any) -> bool:
        """Whether there may be more."""
        match event:
            case h11.Response():
                self._status = event.status_code
            case h11.Data() if self._status == 200:
                self._receive(bytes(event.data))
            case h11.Data():
                self._refusal += event.data
            case h11.EndOfMessage():
                self._end()
                return False
        return event is not h11.NEED_DATA

    def _end(self) -> None:
        if self._status == 200:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(RefusalError(self._status, said(self._refusal)))


async def exchange(
    origin: Origin, method: str, path: str, headers: dict[str, str], body: bytes, receive: Callable[[bytes], None]
) -> None:
    """Returns when the answer has ended. Raises ``RefusalError`` if it was not 200, OSError if there was none."""
    connection = h11.Connection(h11.CLIENT)
    own = {"host": origin.authority, "connection": "close", "content-length": str(len(body))}
    head = h11.Request(method=method, target=origin.prefix + path, headers=list((own | headers).items()))
    parts = [connection.send(event) for event in (head, h11.Data(data=body), h11.EndOfMessage())]
    request = b"".join(part for part in parts if part)
    transport, protocol = await asyncio.get_running_loop().create_connection(
        lambda: Exchange(request, receive, connection), origin.host, origin.port, ssl=origin.tls or None
    )
    try:
        await protocol.ended
    finally:
        transport.abort()


def said(body: bytes) -> str:
    """The message in an error's body: OpenAI's shape, FastAPI's, or text."""
    try:
        error = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return body.decode(errors="replace").strip()[:300]
    while isinstance(error, dict) and (keys := error.keys() & {"error", "message", "detail"}):
        error = error[min(keys, key=("error", "message", "detail").index)]
    return str(error)[:300]
