"""Several kept processes: run together, restarted in turn, stopped in order."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

import structlog

from tokenrelay.service.supervisor.keeper import GaveUp

log = structlog.get_logger()


class Kept(Protocol):
    """What keeps one process."""

    name: str

    async def run(self) -> None: ...
    async def replace(self) -> None: ...
    async def stop(self) -> None: ...


class Crew:
    """``stages`` are stopped one after the other, those within a stage together."""

    def __init__(self, stages: Sequence[Sequence[Kept]]) -> None:
        self._stages = stages
        self._stopping = asyncio.Event()
        self._restart = asyncio.Event()
        self._gave_up = False

    def stop(self) -> None:
        """Let ``run`` stop everything, and return."""
        self._stopping.set()

    def restart(self) -> None:
        """Replace every process, one at a time: the next only when the one before is drained."""
        self._restart.set()

    async def run(self) -> int:
        """Until told to stop, or until one cannot be kept running. Returns the exit code: 0 or 1."""
        runs = [asyncio.create_task(self._keep(kept)) for stage in self._stages for kept in stage]
        restarts = asyncio.create_task(self._restart_when_told())
        await self._stopping.wait()
        await _cancel(restarts)
        for stage in self._stages:
            await asyncio.gather(*(kept.stop() for kept in stage))
        for run in runs:
            await _cancel(run)
        return 1 if self._gave_up else 0

    async def _keep(self, kept: Kept) -> None:
        """Whatever ends a keeper ends the service, instead of leaving it without that process."""
        try:
            await kept.run()
        except Exception as error:
            log.critical("giving up", name=kept.name, error=str(error))
            self._gave_up = True
            self._stopping.set()

    async def _restart_when_told(self) -> None:
        while True:
            await self._restart.wait()
            self._restart.clear()
            try:
                for kept in (kept for stage in self._stages for kept in stage):
                    log.info("restarting", name=kept.name)
                    await kept.replace()
                log.info("restarted everything")
            except (GaveUp, OSError) as error:
                log.error("rolling restart broken off", error=str(error))


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
