"""After a broker's outage every lease has run out: those whose workers live shall not be handed on."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

from redis.asyncio import Redis

from tests.service.conftest import WaitUntil
from tests.service.relay import claim_one, submit
from tests.service.worker.working import working
from tokenrelay.service.broker import connect
from tokenrelay.service.embedded_valkey import EmbeddedValkey
from tokenrelay.service.keys import Keys
from tokenrelay.service.queue import Queue
from tokenrelay.service.settings import Settings
from tokenrelay.service.worker.role import Role

LEASE = 1.0  # seconds


async def lease_is_over(redis: Redis, keys: Keys) -> bool:
    """By the broker's clock; also if somebody took the request over."""
    seconds, microseconds = await redis.time()
    expiry = await redis.zscore(keys.leases, "a")
    return expiry is None or expiry <= seconds * 1000 + microseconds / 1000


async def has_left_the_silent(redis: Redis, keys: Keys) -> bool:
    return await redis.hget(keys.request("a"), "owner") != b"silent"


async def is_finished(redis: Redis, keys: Keys) -> bool:
    return await redis.hget(keys.request("a"), "state") == b"finished"


async def test_other_workers_have_a_lease_s_time_to_come_back(tmp_path: Path, wait_until: WaitUntil) -> None:
    """Here one does not, and its request is handed on after that."""
    broker = EmbeddedValkey(tmp_path, memory_mb=32)
    settings, keys = Settings(redis_url=broker.start(), lease_seconds=LEASE), Keys("outage")
    try:
        async with connect(broker.url) as redis:
            queue = Queue(redis, keys, settings)
            await submit(queue, "a")
            await claim_one(queue, "silent")
            async with working(redis, keys, settings, Role("watching")):
                assert broker.pid
                os.kill(broker.pid, signal.SIGKILL)
                await asyncio.sleep(LEASE)  # the outage's length
                broker.wait()
                back_before = time.monotonic()
                broker.start()
                assert await lease_is_over(redis, keys)
                await wait_until(lambda: has_left_the_silent(redis, keys))
                assert time.monotonic() - back_before >= LEASE
                await wait_until(lambda: is_finished(redis, keys))
    finally:
        broker.stop()
