"""Stored responses in the broker: what each was made from and, once it has ended, the response itself.

A response lives here for a time, or until newer ones take its room. Each belongs to a tenant, and is told to no other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from redis.asyncio import Redis

from tokenrelay.service.api.responses.conversation import Item
from tokenrelay.service.broker import broker_errors
from tokenrelay.service.errors import NotFoundError
from tokenrelay.service.keys import Keys
from tokenrelay.service.lua import Scripts
from tokenrelay.service.settings import Settings


class StoredResponse(NamedTuple):
    """``output`` is the response as JSON; None: it has to be made from its log."""

    input: list[Item]
    output: bytes | None


class ResponseStore:
    """Of one model. Raises BrokerUnavailable when the broker is, or is full."""

    def __init__(self, redis: Redis, keys: Keys, settings: Settings) -> None:
        self._redis = redis
        self._keys = keys
        self._scripts = Scripts(redis, keys)
        self._lifetime_ms = int(settings.response_ttl_seconds * 1000)
        self._retention_ms = int(settings.retention_seconds * 1000)
        self._limit = settings.response_store_mb << 20

    async def put(self, relay_id: str, tenant: str, items: Sequence[Item]) -> None:
        """Keep a response that has begun."""
        keys = [self._keys.response(relay_id), self._keys.responses, self._keys.response_sizes]
        content = json.dumps(items, ensure_ascii=False, separators=(",", ":"))
        await self._scripts.call("store_response", keys, relay_id, tenant, content, self._lifetime_ms, self._limit)

    async def get(self, relay_id: str, tenant: str) -> StoredResponse:
        """Raises NotFoundError, also if it is another tenant's."""
        async with broker_errors():
            reply: Any = await self._redis.hmget(self._keys.response(relay_id), "tenant", "input", "output")
        owner, content, output = reply
        if owner is None or owner.decode() != tenant:
            raise unknown_response()
        return StoredResponse(json.loads(content), output)

    async def settle(self, relay_id: str, response: str) -> None:
        """It has ended. Ignored if it was deleted meanwhile."""
        arguments = (relay_id, response, self._lifetime_ms, self._retention_ms)
        await self._scripts.call("settle_response", [self._keys.response(relay_id)], *arguments)

    async def forget(self, relay_id: str) -> None:
        """Its log goes with it."""
        await self._scripts.call("forget_response", [self._keys.response(relay_id)], relay_id)


def unknown_response() -> NotFoundError:
    return NotFoundError("There is no response of this id, or it is no longer kept.")
