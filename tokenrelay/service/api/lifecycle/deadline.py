"""When a request must have ended. The broker's clock decides; this process asks it at the right moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TypeVar

from tokenrelay.service.errors import BrokerUnavailable, DeadlineExceeded
from tokenrelay.service.queue import Queue

REPLY_SECONDS = 0.1  # for the broker to answer, and for the event that ends the request to arrive

T = TypeVar("T")


class Deadline:
    """Of one request, ``remaining`` seconds from now; None: it has none."""

    def __init__(self, queue: Queue, request_id: str, remaining: float | None) -> None:
        self._queue = queue
        self._request_id = request_id
        self._ended = False
        self._set(remaining)

    async def next(self, events: AsyncIterator[T]) -> T:
        """The next event. Raises DeadlineExceeded if the broker does not tell the request's end in time.

        ``events`` must bear that waiting for its next one is cancelled, and begun again.
        """
        if self._at is None:
            return await anext(events)
        while True:
            try:
                async with asyncio.timeout_at(self._at):
                    return await anext(events)
            except TimeoutError:
                await self._pass()

    async def _pass(self) -> None:
        """Have the broker end the request: its last event comes like any other, unless the broker is gone."""
        if self._ended:
            raise DeadlineExceeded("The request was not done before its deadline.")
        remaining: float | None = None
        try:
            async with asyncio.timeout(REPLY_SECONDS):
                remaining = await self._queue.expire(self._request_id)
        except (BrokerUnavailable, TimeoutError):
            pass
        self._ended = remaining is None
        self._set(REPLY_SECONDS if remaining is None else remaining)

    def _set(self, remaining: float | None) -> None:
        self._at = None if remaining is None else asyncio.get_running_loop().time() + remaining
