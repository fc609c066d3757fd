"""The life of an API process: serve at once, drain at SIGTERM, exit 0."""

from __future__ import annotations

import asyncio
import gc
import math
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import cast

import uvicorn
from fastapi import FastAPI

from tokenrelay.service.api.app import create_app
from tokenrelay.service.api.http.connection import KEEP_ALIVE_SECONDS, Connection
from tokenrelay.service.api.process import ApiProcess
from tokenrelay.service.api.served_model import load_served_model
from tokenrelay.service.notification import tell_ready
from tokenrelay.service.settings import Settings

LAST_WORDS_SECONDS = 5  # after the drain: for the error that ends each stream to be sent
PARTING_SECONDS = 1.0  # for an idle connection's next request, which may be on its way already
POLL_SECONDS = 0.02


def run_api(settings: Settings, *, sock: socket.socket | None = None, ready_fd: int = -1) -> None:
    """Serve on ``sock``, or on the settings' address, until SIGTERM or SIGINT; then exit with code 0.

    Once it serves, ``ready_fd`` is told so. A process that a bug has crippled exits at once, with code 1: its clients
    read on at the next.
    """
    app = create_app(settings, load_served_model(settings))
    server = DrainingServer(app, settings, on_start=lambda: tell_ready(ready_fd))
    gc.freeze()  # the garbage collector need not walk the libraries and the vocabulary again and again
    gc.enable()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: sys.exit(0))  # uvicorn raises the signal again after a graceful end
    server.run(sockets=[sock] if sock else None)
    if server.is_crippled:
        sys.exit(1)


class DrainingServer(uvicorn.Server):
    """Not ready from the first signal on; streams may finish until ``drain_seconds``, then end with an error.

    Another process may serve the same socket on: no request that reaches this one is lost, and every answer asks the
    client to come back on a new connection.
    """

    def __init__(self, app: FastAPI, settings: Settings, *, on_start: Callable[[], None] = lambda: None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                http=Connection,  # h11, for its limit on headers: httptools has none
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                ws="none",
                lifespan="on",
                log_level=settings.log_level,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=math.ceil(settings.drain_seconds) + LAST_WORDS_SECONDS,
            )
        )
        self._app = app
        self._on_start = on_start
        self._drain_seconds = settings.drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.started:
            self._process.readiness.draining = True
        super().handle_exit(sig, frame)

    @property
    def is_crippled(self) -> bool:
        return self.started and self._process.crippled.is_set()

    async def on_tick(self, counter: int) -> bool:
        if self.is_crippled:
            self._drain_seconds = 0  # nothing would come
        return self.is_crippled or await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for sock in sockets or ():
            if sock.family != socket.AF_UNIX:
                # asyncio leaves it out where the socket was made without a protocol number; tokens would wait 40 ms
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await super().startup(sockets)
        self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self._drain_seconds, self._process.generations.interrupt)
        await self._stop_accepting()
        await self._part_from_clients()
        await super().shutdown(sockets)

    async def _stop_accepting(self) -> None:
        """Closing at once would drop connections that asyncio has accepted and not yet set up."""
        loop = asyncio.get_running_loop()
        for listener in (listener for server in self.servers for listener in server.sockets):
            loop.remove_reader(listener.fileno())
        for _ in range(3):  # turns of the loop until the last accepted connection is one of ours
            await asyncio.sleep(0)
        for server in self.servers:
            server.close()

    async def _part_from_clients(self) -> None:
        """Idle connections get one more answer, if they ask soon; closing them at once would fail who just asked."""
        self.server_state.default_headers = [*self.server_state.default_headers, (b"connection", b"close")]
        for connection in self._connections:
            if not connection.is_idle:
                connection.cycle.keep_alive = False  # its headers may be sent already
        with suppress(TimeoutError):
            async with asyncio.timeout(min(PARTING_SECONDS, self._drain_seconds)):
                while any(connection.is_idle for connection in self._connections):  # noqa: ASYNC110 - uvicorn tells nobody of them
                    await asyncio.sleep(POLL_SECONDS)

    @property
    def _connections(self) -> list[Connection]:
        return cast(list[Connection], list(self.server_state.connections))

    @property
    def _process(self) -> ApiProcess:
        process: ApiProcess = self._app.state.api
        return process
