"""What tenants used, as the broker counts it when a request ends: once, whoever ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from redis.asyncio import Redis

from tokenrelay.service.broker import broker_errors
from tokenrelay.service.keys import Keys

DAY_SECONDS = 24 * 3600


class Used(NamedTuple):
    """Of requests that ended. Cached tokens are among those of the prompts."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class UsageLedger:
    """Reads it. Raises BrokerUnavailable when the broker is."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys

    async def total(self, tenant: str) -> Used:
        [used] = await self._read(tenant, [self._keys.usage])
        return used

    async def by_day(self, tenant: str, num_days: int) -> dict[int, Used]:
        """Of the last days, today first; a day is the Unix time of its beginning, in UTC."""
        async with broker_errors():
            now, _ = await self._redis.time()
        today = now // DAY_SECONDS
        days = range(today, today - num_days, -1)
        used = await self._read(tenant, [self._keys.usage_on(day) for day in days])
        return {day * DAY_SECONDS: of_day for day, of_day in zip(days, used, strict=True)}

    @broker_errors()
    async def _read(self, tenant: str, keys: Sequence[str]) -> list[Used]:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.hmget(key, [f"{tenant}:{counter}" for counter in Used._fields])
            found: list[Any] = await pipeline.execute()
        return [Used(*(int(count or 0) for count in counts)) for counts in found]
