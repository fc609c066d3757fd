"""Few connections for any number of callers, who wait in line for as long as the line moves.

redis-py's own pools either fail at the first caller too many, or give up after a fixed wait: then a burst of requests
looks like a dead broker. They also lose a connection, or a wake-up, when a caller is cancelled at the wrong moment.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError

LOOKS = 3  # in which nobody was served: after one alone it may have been this process that was too busy to see it


class QueuedPool(ConnectionPool):
    """Raises ConnectionError to who waits when for ``patience`` seconds nobody was served.

    Taking and giving back are single steps of the event loop: no cancellation comes between.
    """

    def __init__(self, *, patience: float, **options: Any) -> None:
        super().__init__(**options)
        self._patience = patience
        self._free = asyncio.Semaphore(self.max_connections)
        self._served_at = 0.0

    async def get_connection(self, *_: Any, **__: Any) -> AbstractConnection:
        await self._wait_in_line()
        connection: AbstractConnection = self.get_available_connection()  # type: ignore[no-untyped-call]
        try:
            await self.ensure_connection(connection)
        except BaseException:
            await self.release(connection)
            raise
        return connection

    async def release(self, connection: AbstractConnection) -> None:
        if connection.is_connected:  # else its command failed
            self._served_at = time.monotonic()
        self._in_use_connections.remove(connection)
        self._available_connections.append(connection)
        self._free.release()

    async def _wait_in_line(self) -> None:
        if not self._free.locked():
            await self._free.acquire()  # at once
            return
        turn = asyncio.ensure_future(self._free.acquire())
        idle_looks = 0
        try:
            while not (await asyncio.wait({turn}, timeout=self._patience / LOOKS))[0]:
                idle_looks = 0 if time.monotonic() - self._served_at < self._patience else idle_looks + 1
                if idle_looks >= LOOKS:
                    raise ConnectionError("The broker serves nobody.")
        except BaseException:
            if not turn.cancel():  # it had come
                self._free.release()
            raise
