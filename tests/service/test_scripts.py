"""A broker may forget its scripts at any moment: a restart, a failover, SCRIPT FLUSH. No call may notice."""

from __future__ import annotations

from typing import Any

import pytest
from redis.asyncio import Redis

from tokenrelay.service.queue import Queue


async def test_scripts_are_forgotten(redis: Redis, queue: Queue) -> None:
    for _ in range(2):
        assert await queue.reclaim() == []
        await redis.script_flush()
    assert await queue.reclaim() == []


async def test_a_script_is_forgotten_as_soon_as_it_is_loaded(
    redis: Redis, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a restart between two commands."""
    load = redis.script_load

    async def load_in_vain(script: str) -> Any:
        digest = await load(script)
        await redis.script_flush()
        return digest

    monkeypatch.setattr(redis, "script_load", load_in_vain)
    await redis.script_flush()
    assert await queue.reclaim() == []
