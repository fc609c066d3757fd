"""Keeps one process running: starts another when it dies, and replaces it without a gap when asked to."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress

import structlog

from tokenrelay.service.embedded_valkey import EmbeddedValkey
from tokenrelay.service.supervisor.child import Child

log = structlog.get_logger()

MAX_FAILED_STARTS = 5  # in a row: what never comes up will not be cured by another start
BACKOFF_BASE, BACKOFF_CAP, BACKOFF_WINDOW = 0.1, 5.0, 60.0  # seconds
KILL_SECONDS = 8.0  # grace after the drain limit, of which an API process uses up to six


class GaveUp(Exception):
    """A process cannot be kept running."""


class Backoff:
    """When to start a process again, and when to stop trying.

    One that had come up and then died is started again however often: requests kill workers, and whoever sends such
    requests shall not be able to end the service with them.
    """

    def __init__(self, name: str, first_pause: float = BACKOFF_BASE) -> None:
        self._name = name
        self._first_pause = first_pause
        self._deaths: deque[float] = deque(maxlen=16)
        self._failed_starts = 0

    async def pause(self, *, was_ready: bool) -> None:
        """Wait, the longer the more often it died of late. Raises GaveUp."""
        self._failed_starts = 0 if was_ready else self._failed_starts + 1
        if self._failed_starts == MAX_FAILED_STARTS:
            raise GaveUp(f"{self._name} did not come up {MAX_FAILED_STARTS} times in a row")
        now = time.monotonic()
        self._deaths.append(now)
        recent = sum(now - then < BACKOFF_WINDOW for then in self._deaths)
        await asyncio.sleep(min(BACKOFF_CAP, self._first_pause * 2 ** (recent - 1)))


class Keeper:
    """The keeper of one process.

    Args:
        start: starts one.
        bury: called with each that ended otherwise than with exit code 0.
        drain_seconds: how long it may take to end when it is told to.
        first_pause: seconds between a death and the next start, if there was none of late.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], Awaitable[Child]],
        bury: Callable[[Child], Awaitable[None]],
        drain_seconds: float,
        first_pause: float = BACKOFF_BASE,
    ) -> None:
        self.name = name
        self._start = start
        self._bury = bury
        self._stop_seconds = drain_seconds + KILL_SECONDS
        self._backoff = Backoff(name, first_pause)
        self._child: Child | None = None
        self._changing = asyncio.Lock()  # whoever holds it may put another in the child's place
        self._stopping = False

    async def run(self) -> None:
        """Until ``stop``. Raises GaveUp, or OSError when nothing can be started."""
        child = await self._put_in_place_of(None)
        while child and not self._stopping:
            code = await child.wait()
            if child is self._child and not self._stopping:
                await self._note_death(child, code)
            child = await self._put_in_place_of(child)

    async def replace(self) -> None:
        """Start another, and stop this one when that is ready. Raises GaveUp if it never is; this one stays then."""
        async with self._changing:
            new = await self._start()
            try:
                if not await new.ready():
                    raise GaveUp(f"the new {self.name} did not come up; the old one goes on")
                old, self._child = self._child, new
            finally:
                if self._child is not new:
                    await new.kill()
        if old:
            await self._stop(old)

    async def stop(self) -> None:
        """For good."""
        self._stopping = True
        async with self._changing:
            if self._child:
                await self._stop(self._child)

    async def _put_in_place_of(self, child: Child | None) -> Child | None:
        """Start one, unless somebody else has done so meanwhile or it is over. Returns the one in place."""
        async with self._changing:
            if self._child is child and not self._stopping:
                self._child = await self._start()
            return self._child

    async def _note_death(self, child: Child, code: int) -> None:
        log.error("process died", name=self.name, exit_code=code)
        if code != 0:
            await self._bury(child)
        await self._backoff.pause(was_ready=child.was_ready)

    async def _stop(self, child: Child) -> None:
        if await child.stop(self._stop_seconds) != 0:
            await self._bury(child)


class BrokerKeeper:
    """The same for the embedded Valkey, which nothing can replace without a gap: its data have one owner."""

    name = "broker"

    def __init__(self, broker: EmbeddedValkey) -> None:
        self._broker = broker
        self._backoff = Backoff(self.name)
        self._stopping = False

    async def run(self) -> None:
        while True:
            code = await asyncio.to_thread(self._broker.wait)
            if self._stopping:
                return
            log.error("process died", name=self.name, exit_code=code)
            await self._backoff.pause(was_ready=True)
            self._broker.start()  # in this thread: Linux ends the child with the thread that started it

    async def replace(self) -> None:
        """Stays as it is."""

    async def stop(self) -> None:
        self._stopping = True
        with suppress(ProcessLookupError):
            await asyncio.to_thread(self._broker.stop)
