"""Whether a request sent now would be worked on, read from what workers announce; nothing is guessed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from tokenrelay.service.errors import BrokerUnavailable
from tokenrelay.service.messages import WorkerFacts
from tokenrelay.service.registry import Registry
from tokenrelay.service.settings import Settings

STALL_LEASES = 4  # an engine that made no turn for this many leases hangs, whatever its heartbeat says


class _Progress(NamedTuple):
    step_counter: int
    since: float


class Readiness:
    def __init__(self, registry: Registry, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self.draining = False
        self._registry = registry
        self._clock = clock
        self._stall_seconds = STALL_LEASES * settings.lease_seconds
        self._progress: dict[str, _Progress] = {}

    async def observe(self) -> str | None:
        """Why this process is not ready; None if it is. Also called regularly, to notice engines that stand still."""
        if self.draining:
            return "this server is stopping"
        try:
            workers = await self._registry.workers()
        except BrokerUnavailable:
            return "the broker does not answer"
        self._note(workers)
        if not workers:
            return "no worker is running"
        if not any(self._works(worker) for worker in workers):
            return "every worker is draining or makes no progress"
        return None

    def _note(self, workers: list[WorkerFacts]) -> None:
        now = self._clock()
        before, self._progress = self._progress, {}
        for worker in workers:
            known = before.get(worker.worker_id)
            moved = known is None or known.step_counter != worker.step_counter
            self._progress[worker.worker_id] = _Progress(worker.step_counter, now) if known is None or moved else known

    def _works(self, worker: WorkerFacts) -> bool:
        stalled = self._clock() - self._progress[worker.worker_id].since > self._stall_seconds
        return not worker.draining and not stalled
