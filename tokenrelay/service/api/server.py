"""The life of an API process: serve at once, drain at SIGTERM, exit 0."""

from __future__ import annotations

import asyncio
import math
import signal
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from tokenrelay.service.api.app import create_app
from tokenrelay.service.api.process import ApiProcess
from tokenrelay.service.api.served_model import load_served_model
from tokenrelay.service.settings import Settings

LAST_WORDS_SECONDS = 5  # after the drain: for the error that ends each stream to be sent


def run_api(settings: Settings, *, sock: socket.socket | None = None) -> None:
    """Serve on ``sock``, or on the settings' address, until SIGTERM or SIGINT; then exit with code 0."""
    app = create_app(settings, load_served_model(settings))
    server = DrainingServer(app, settings)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: sys.exit(0))  # uvicorn raises the signal again after a graceful end
    server.run(sockets=[sock] if sock else None)


class DrainingServer(uvicorn.Server):
    """Not ready from the first signal on; streams may finish until ``drain_seconds``, then end with an error."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                http="h11",  # its limit on headers is the reason: httptools has none
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
        self._drain_seconds = settings.drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.started:
            self._process.readiness.draining = True
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for sock in sockets or ():
            if sock.family != socket.AF_UNIX:
                # asyncio leaves it out where the socket was made without a protocol number; tokens would wait 40 ms
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self._drain_seconds, self._process.generations.interrupt)
        await super().shutdown(sockets)

    @property
    def _process(self) -> ApiProcess:
        process: ApiProcess = self._app.state.api
        return process
