"""A few connections serve any number of callers, whoever of them gives up; and no caller sees another's reply."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError

from tests.service.faulty_broker import FaultyBroker
from tokenrelay.service.broker import MAX_CONNECTIONS, SOCKET_TIMEOUT, connect
from tokenrelay.service.embedded_valkey import EmbeddedValkey

REPLY_SECONDS = 0.002  # the proxy's delay, which gives a cancellation time to come between command and reply
CANCELLED = 3000


@pytest.fixture
async def slow_redis(url: str, tmp_path: Path) -> AsyncIterator[Redis]:
    """Behind a proxy that holds each reply back for a moment."""
    broker = Path(url.removeprefix("unix://"))
    async with (
        FaultyBroker(broker, tmp_path / "slow.sock", lambda: None, delay=REPLY_SECONDS) as proxy,
        connect(proxy.url) as client,
    ):
        yield client


async def test_a_caller_sees_its_own_reply_however_many_others_were_cancelled(slow_redis: Redis) -> None:
    """CVE-2023-28858: a command cancelled on its way left its reply to the connection's next user."""
    chance = random.Random(28858)
    await slow_redis.mset({f"key{i}": i for i in range(100)})
    seen: list[tuple[int, Any]] = []

    async def look(number: int) -> None:
        seen.append((number, await slow_redis.get(f"key{number}")))

    for _ in range(CANCELLED // 100):
        looks = [asyncio.create_task(look(number)) for number in range(100)]
        for task in chance.sample(looks, 100):
            await asyncio.sleep(chance.choice((0, 0, 0.0003)))
            task.cancel()
        await asyncio.gather(*looks, return_exceptions=True)
        await asyncio.gather(*(look(number) for number in range(5)))
    assert len(seen) < CANCELLED, "hardly any was cancelled on its way"
    assert len(seen) >= CANCELLED // 20
    assert [(number, reply) for number, reply in seen if reply != str(number).encode()] == []
    await slow_redis.delete(*(f"key{i}" for i in range(100)))


async def test_cancelled_callers_leave_no_connection_behind(slow_redis: Redis) -> None:
    chance = random.Random(1)
    for _ in range(20):
        callers = [asyncio.ensure_future(slow_redis.get("key")) for _ in range(30)]
        for task in callers:
            await asyncio.sleep(chance.choice((0, 0, REPLY_SECONDS / 4)))
            task.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
    async with asyncio.timeout(60):  # as many at a time as ever
        assert await asyncio.gather(*(slow_redis.ping() for _ in range(MAX_CONNECTIONS * 3)))
    pool = slow_redis.connection_pool
    assert (len(pool._in_use_connections), len(pool._available_connections)) == (0, MAX_CONNECTIONS)


async def test_a_line_that_moves_is_waited_in_however_long_it_is(slow_redis: Redis) -> None:
    callers = round(1.5 * SOCKET_TIMEOUT / REPLY_SECONDS * MAX_CONNECTIONS)
    started = time.monotonic()
    assert all(await asyncio.gather(*(slow_redis.ping() for _ in range(callers))))
    assert time.monotonic() - started > SOCKET_TIMEOUT


async def test_a_line_that_stands_still_is_left(tmp_path: Path) -> None:
    broker = EmbeddedValkey(tmp_path, memory_mb=16)
    broker.start()
    async with connect(broker.url) as redis:
        await asyncio.gather(*(redis.ping() for _ in range(MAX_CONNECTIONS)))
        assert broker.pid
        os.kill(broker.pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            replies = await asyncio.gather(*(redis.ping() for _ in range(100)), return_exceptions=True)
            waited = time.monotonic() - started
        finally:
            os.kill(broker.pid, signal.SIGCONT)
        assert all(isinstance(reply, Exception) for reply in replies)
        assert sum(isinstance(reply, ConnectionError) for reply in replies) >= 100 - 2 * MAX_CONNECTIONS
        assert waited < 10 * SOCKET_TIMEOUT  # one after the other they would wait for thirty
        async with asyncio.timeout(60):
            while True:
                with suppress(ConnectionError):
                    assert await redis.ping()
                    break
    broker.stop()
