"""A broker may forget its scripts at any moment: a restart, a failover, SCRIPT FLUSH. No call may notice."""

from __future__ import annotations

import asyncio

from redis.asyncio import Redis

from tokenrelay.service.broker import connect
from tokenrelay.service.queue import Queue


async def test_scripts_are_forgotten_again_and_again(url: str, queue: Queue) -> None:
    async with connect(url) as other:
        forgetting = asyncio.create_task(forget_scripts(other))
        for _ in range(40):
            assert await queue.reclaim() == []
        assert not forgetting.done()
        forgetting.cancel()
        await asyncio.gather(forgetting, return_exceptions=True)


async def forget_scripts(redis: Redis) -> None:
    while True:
        await redis.script_flush()
