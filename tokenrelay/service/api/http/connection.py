"""One client's connection: HTTP/1.1 by uvicorn and h11, with limits on how long a client may leave us waiting.

Whoever is too slow to send a request, or to take its answer, only holds memory and a file descriptor. A body that is
wanted is ``body.py``'s to wait for.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any

import h11
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

from tokenrelay.service.api.http.error_handlers import error_response
from tokenrelay.service.errors import RequestTimeout

HEAD_SECONDS = 7.0  # from first to last byte of a request's head
LINGER_SECONDS = 2.0  # for what comes behind an answer: closing at once would destroy the answer on its way
STALL_SECONDS = 30.0  # for a client to make room for ROOM_BYTES more of its answer
BUFFERED_BYTES, ROOM_BYTES = 32 << 10, 8 << 10  # of an answer, before and until it is written on
VANISHED_MILLISECONDS = 60_000  # for its side to acknowledge anything
KEEP_ALIVE_SECONDS = 75  # clients drop idle connections earlier: a request sent as we close one would be lost
UNSENT_BYTES = 16 << 10  # that the kernel takes from us before the client's side has taken them
_CUT_OFF = "cut_off"
_RESET = struct.pack("ii", 1, 0)  # of SO_LINGER: the kernel forgets what it could not send, and says so


def was_cut_off(scope: Scope) -> bool:
    """Whether it was this process that closed the request's connection, because its client was too slow."""
    return _CUT_OFF in scope.get("state", ())


class Connection(H11Protocol):
    """A byte now and then buys no time. Also a closing connection ends, though its client takes nothing any more."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._receiving: asyncio.TimerHandle | None = None
        self._refused = False
        self._stalling: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=BUFFERED_BYTES, low=BUFFERED_BYTES - ROOM_BYTES)
        _limit_kernel(transport.get_extra_info("socket"))
        self._watch_request()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        for timer in (self._receiving, self._stalling):
            if timer:
                timer.cancel()

    # --- a request that does not come ---------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        self._watch_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_request()
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._watch_reading()

    @property
    def is_idle(self) -> bool:
        """No request is at work. One may be on its way."""
        return self.cycle is None or self.cycle.response_complete

    def _watch_request(self) -> None:
        if self.is_idle and self._is_receiving:
            self._receiving = self._receiving or self.loop.call_later(self._patience, self._give_up_receiving)
            return
        if self._receiving:
            self._receiving.cancel()
            self._receiving = None
        if self.is_idle and not self.timeout_keep_alive_task:  # uvicorn forgets it when a body ends after its answer
            self.timeout_keep_alive_task = self.loop.call_later(KEEP_ALIVE_SECONDS, self.timeout_keep_alive_handler)

    @property
    def _is_receiving(self) -> bool:
        """The connection's first request, the rest of a head, or of a body that is answered already."""
        return self.cycle is None or self.conn.their_state is not h11.IDLE or bool(self.conn.trailing_data[0])

    @property
    def _patience(self) -> float:
        return HEAD_SECONDS if self.conn.their_state is h11.IDLE else LINGER_SECONDS

    def _give_up_receiving(self) -> None:
        if self._refused or self.conn.their_state is not h11.IDLE or not self.conn.trailing_data[0]:
            self.transport.close()
            return
        self._refused = True
        self.transport.write(_TIMED_OUT)
        self.transport.write_eof()
        self._receiving = self.loop.call_later(LINGER_SECONDS, self._give_up_receiving)

    def timeout_keep_alive_handler(self) -> None:
        """One more turn of the loop: a request that has arrived meanwhile is read first."""
        self.timeout_keep_alive_task = self.loop.call_later(0, self._close_idle)

    def _close_idle(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        super().timeout_keep_alive_handler()

    # --- an answer that is not taken ----------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalling:
            self._stalling.cancel()
            self._stalling = None

    def _watch_reading(self) -> None:
        self._stalling = self._stalling or self.loop.call_later(STALL_SECONDS, self._cut_off)

    def _cut_off(self) -> None:
        self.scope["state"][_CUT_OFF] = True
        connection: socket.socket = self.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.transport.abort()


def _limit_kernel(connection: socket.socket) -> None:
    """Its memory, and its patience with a client that acknowledges nothing or has no room. (Linux, some of it macOS)"""
    if connection.family == socket.AF_UNIX:
        return
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, VANISHED_MILLISECONDS)


def _timed_out() -> bytes:
    """The whole response to a head that does not come: there is no request yet that a route could answer."""
    response = error_response(RequestTimeout(f"The request did not arrive within {HEAD_SECONDS:.0f} seconds."))
    headers = b"".join(b"%s: %s\r\n" % header for header in response.raw_headers)
    return b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\n" + headers + b"\r\n" + bytes(response.body)


_TIMED_OUT = _timed_out()
