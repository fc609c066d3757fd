"""Whether a request sent now would be worked on, read from what workers announce; nothing is guessed."""

from __future__ import annotations

from tokenrelay.service.errors import BrokerUnavailable
from tokenrelay.service.messages import VERSION, WorkerFacts
from tokenrelay.service.registry import Registry


class Readiness:
    """A worker that died, hangs or is stopped says so within two seconds, at the latest by its silence."""

    def __init__(self, registry: Registry) -> None:
        self.draining = False
        self._registry = registry

    async def observe(self) -> str | None:
        """Why this process is not ready; None if it is."""
        if self.draining:
            return "this server is stopping"
        try:
            workers = await self._registry.workers()
        except BrokerUnavailable:
            return "the broker does not answer"
        return None if any(map(_works, workers)) else _why_none_works(workers)


def _works(worker: WorkerFacts) -> bool:
    """A spare one counts: with no other alive, it claims."""
    return not worker.draining and not worker.stalled and worker.protocol >= VERSION


def _why_none_works(workers: list[WorkerFacts]) -> str:
    if not workers:
        return "no worker is running"
    if all(worker.protocol < VERSION for worker in workers):
        return "every worker is older than this server"
    return "every worker is draining or makes no progress"
