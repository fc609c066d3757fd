"""Which workers live, and what they announce of themselves. Readiness is read from here, not guessed."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from redis.asyncio import Redis

from tokenrelay.service.broker import broker_errors
from tokenrelay.service.keys import Keys
from tokenrelay.service.lua import Scripts
from tokenrelay.service.messages import MessageError, WorkerFacts, decode_facts, encode
from tokenrelay.service.settings import Settings

MISSED_ANNOUNCEMENTS = 3  # so many in a row, and the worker counts as absent


class Registry:
    """The workers of one model, each as it announced itself last. Whoever falls silent is gone long before its leases:
    announcements cost nothing to renew, a request handed on too early would be computed twice."""

    def __init__(self, redis: Redis, keys: Keys, settings: Settings) -> None:
        self._redis = redis
        self._keys = keys
        self._scripts = Scripts(redis, keys)
        self._lifetime_ms = int(MISSED_ANNOUNCEMENTS * settings.announce_seconds * 1000)

    async def announce(self, facts: WorkerFacts) -> None:
        keys = [self._keys.worker(facts.worker_id), self._keys.workers]
        await self._scripts.call("announce", keys, facts.worker_id, encode(facts), self._lifetime_ms)

    @broker_errors()
    async def withdraw(self, worker_id: str) -> None:
        """Say goodbye, instead of letting the announcement run out."""
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.delete(self._keys.worker(worker_id), self._keys.claim(worker_id))
            pipeline.zrem(self._keys.workers, worker_id)
            await pipeline.execute()

    @broker_errors()
    async def workers(self) -> list[WorkerFacts]:
        """The live ones. One whose announcement this version cannot read counts as absent."""
        names: Any = await self._redis.zrange(self._keys.workers, 0, -1)
        if not names:
            return []
        announcements: list[Any] = await self._redis.mget([self._keys.worker(name.decode()) for name in names])
        live = []
        for announcement in filter(None, announcements):
            with suppress(MessageError):
                live.append(decode_facts(announcement))
        return live

    async def num_active(self) -> int:
        """How many workers take new requests, the spare ones not counted."""
        return sum(worker.active for worker in await self.workers())
