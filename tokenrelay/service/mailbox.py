"""An API process's side of the token stream: one blocking read for all its clients.

The log is the truth, the mailbox only the fast path: whatever a subscription misses (a full buffer, a broker restart, a
trimmed mailbox) it reads from the log. Memory is bounded per subscription, however slow its client.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from types import TracebackType
from typing import Any, Self

from redis.asyncio import Redis

from tokenrelay.service.broker import BLOCK_SECONDS, broker_errors
from tokenrelay.service.errors import BrokerUnavailable
from tokenrelay.service.keys import MAILBOX_TTL, Keys
from tokenrelay.service.lua import Scripts
from tokenrelay.service.messages import Event, MessageError, decode_deliveries
from tokenrelay.service.token_log import TokenLog

BUFFER_EVENTS = 64  # per subscription; a client further behind is served from the log
ENTRIES_PER_READ = 64
RECONNECT_SECONDS = 0.2


class Mailbox:
    """The mailbox ``api_id``. ``run`` must run for subscriptions to advance; ``name`` is what submit wants."""

    def __init__(self, blocking_redis: Redis, redis: Redis, keys: Keys, token_log: TokenLog, api_id: str) -> None:
        self.name = api_id
        self._key = keys.mailbox(api_id)
        self._blocking_redis = blocking_redis
        self._scripts = Scripts(redis, keys)
        self._token_log = token_log
        self._subscriptions: defaultdict[str, set[Subscription]] = defaultdict(set)
        self._read = 0  # entries count 0-1, 0-2 …
        self._renew_at = 0.0

    def subscribe(self, request_id: str, after: int | None = None) -> Subscription:
        """Events of one request. ``after=None``: a request yet to be submitted, with this mailbox's name.

        Otherwise any request, from any process's client, from behind index ``after``; entering raises NotFoundError
        if it is unknown or forgotten.
        """
        return Subscription(self, self._token_log, request_id, after)

    async def run(self) -> None:
        """Read for ever; broker restarts are survived."""
        while True:
            try:
                await self._start_over()
                while True:
                    await self._renew()
                    await self._deliver_next()
            except BrokerUnavailable:
                await asyncio.sleep(RECONNECT_SECONDS)

    async def _start_over(self) -> None:
        """Continue at the newest entry, and read what came before from the logs."""
        self._read, _ = await self._open()
        self._catch_up()

    async def _renew(self) -> None:
        """Keep the stream alive. A broker that lost data has none, or counts its entries from an earlier number."""
        if time.monotonic() < self._renew_at:
            return
        newest, created = await self._open()
        if created or newest < self._read:
            await self._start_over()

    async def _open(self) -> tuple[int, bool]:
        """The number of its newest entry, and whether there was none."""
        newest, created = await self._scripts.call("open_mailbox", [self._key], MAILBOX_TTL)
        self._renew_at = time.monotonic() + MAILBOX_TTL / 4
        return int(newest), bool(created)

    @broker_errors()
    async def _deliver_next(self) -> None:
        reply: Any = await self._blocking_redis.xread(
            {self._key: f"0-{self._read}"}, count=ENTRIES_PER_READ, block=int(BLOCK_SECONDS * 1000)
        )
        if not reply:
            self._renew_at = 0.0  # is it still there?
        for entry_id, fields in reply[0][1] if reply else ():
            number = _number(entry_id)
            if number != self._read + 1:
                self._catch_up()  # trimmed before it was read
            self._read = number
            self._deliver(fields[b"d"])

    def _deliver(self, entry: bytes) -> None:
        try:
            deliveries = decode_deliveries(entry)
        except MessageError:  # from a worker of another version
            self._catch_up()
            return
        for delivery in deliveries:
            for subscription in self._subscriptions.get(delivery.request_id, ()):
                subscription.offer(delivery.index, delivery.event)

    def _catch_up(self) -> None:
        for subscriptions in self._subscriptions.values():
            for subscription in subscriptions:
                subscription.catch_up()

    def add(self, subscription: Subscription) -> None:
        self._subscriptions[subscription.request_id].add(subscription)

    def discard(self, subscription: Subscription) -> None:
        subscriptions = self._subscriptions[subscription.request_id]
        subscriptions.discard(subscription)
        if not subscriptions:
            del self._subscriptions[subscription.request_id]


class Subscription:
    """An async context manager and async iterator of (index, event); ends after the terminal event.

    Survives an absent broker by waiting. Raises NotFoundError if the broker came back without the request.
    """

    def __init__(self, mailbox: Mailbox, token_log: TokenLog, request_id: str, after: int | None) -> None:
        self.request_id = request_id
        self.remaining: float | None = None  # seconds until its deadline, as of entering
        self._mailbox = mailbox
        self._token_log = token_log
        self._resumed = after is not None
        self._next = (after or 0) + 1
        self._buffer: deque[tuple[int, Event]] = deque()
        self._behind = self._resumed  # the log has events that neither the buffer nor the client has
        self._ended = False
        self._wakeup = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._mailbox.add(self)
        if self._resumed:
            await self._join()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._mailbox.discard(self)

    def __aiter__(self) -> Self:
        return self

    @property
    def ready(self) -> bool:
        """Whether the next event is here: to take it is no wait."""
        return bool(self._buffer)

    async def __anext__(self) -> tuple[int, Event]:
        while not self._buffer:
            if self._ended:
                raise StopAsyncIteration
            self._wakeup.clear()
            if self._behind:
                await self._read_log()
            else:
                await self._wakeup.wait()
        index, event = self._buffer.popleft()
        self._next = index + 1
        self._ended = event.terminal
        return index, event

    def offer(self, index: int, event: Event) -> None:
        """Called by the mailbox. Takes the next event; anything else it leaves to the log."""
        expected = self._next + len(self._buffer)
        if index < expected:
            return
        if index > expected or len(self._buffer) >= BUFFER_EVENTS:
            self._behind = True
        elif not self._behind:
            self._buffer.append((index, event))
        self._wakeup.set()

    def catch_up(self) -> None:
        """Called by the mailbox when it may have missed something."""
        self._behind = True
        self._wakeup.set()

    async def _join(self) -> None:
        try:
            tail = await self._token_log.follow(self.request_id, self._mailbox.name)
        except BaseException:
            self._mailbox.discard(self)
            raise
        self.remaining = tail.remaining
        self._next = min(self._next, tail.last + 1)  # whoever claims to have seen more gets what comes next
        self._ended = tail.finished and self._next > tail.last

    async def _read_log(self) -> None:
        self._behind = False  # before reading: what arrives meanwhile may set it again
        entries = None
        try:
            entries = await self._token_log.read(self.request_id, self._next - 1, limit=BUFFER_EVENTS)
        except BrokerUnavailable:
            await asyncio.sleep(RECONNECT_SECONDS)
        finally:
            self._behind = self._behind or entries is None or len(entries) == BUFFER_EVENTS
        self._buffer = max(deque(entries or ()), self._buffer, key=len)  # both begin at the next event


def _number(entry_id: bytes) -> int:
    """``b"0-7"`` → 7"""
    return int(entry_id.partition(b"-")[2])
