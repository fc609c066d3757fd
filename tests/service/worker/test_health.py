"""Readiness tells of an engine that hangs, within two seconds, while its process goes on as if nothing was."""

from __future__ import annotations

import time

from redis.asyncio import Redis

from tests.service.conftest import WaitUntil
from tests.service.relay import submit
from tests.service.running import TWO_SECONDS
from tests.service.worker.working import working
from tokenrelay.service.api.operations.readiness import Readiness
from tokenrelay.service.keys import Keys
from tokenrelay.service.queue import Queue
from tokenrelay.service.registry import Registry
from tokenrelay.service.settings import Settings
from tokenrelay.service.worker.role import Role


async def test_an_engine_that_hangs_is_not_ready_until_it_goes_on(
    redis: Redis, keys: Keys, settings: Settings, queue: Queue, wait_until: WaitUntil
) -> None:
    readiness = Readiness(Registry(redis, keys, settings))
    async with working(redis, keys, settings, Role("worker")) as hand:

        async def held() -> bool:
            return len(hand.held) == 1

        async def ready() -> bool:
            return await readiness.observe() is None

        async def not_ready() -> bool:
            return not await ready()

        assert await ready()
        hand.network.gate.clear()
        await submit(queue, "a")
        await wait_until(held)
        hung_at = time.monotonic()
        await wait_until(not_ready)
        assert time.monotonic() - hung_at < TWO_SECONDS
        assert await readiness.observe() == "every worker is draining or makes no progress"
        hand.network.gate.set()
        await wait_until(ready)


async def test_an_idle_engine_is_ready_for_ever(
    redis: Redis, keys: Keys, settings: Settings, wait_until: WaitUntil
) -> None:
    async with working(redis, keys, settings, Role("worker")) as hand:
        before = hand.worker._facts().step_counter

        async def turned_over() -> bool:
            assert not hand.worker._facts().stalled
            return hand.worker._facts().step_counter > before + 2

        await wait_until(turned_over)
