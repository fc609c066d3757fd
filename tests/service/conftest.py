"""A real Valkey for every test below, started once; no test may leave a key behind that never expires."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import redis as sync_redis
from redis.asyncio import Redis

from tokenrelay.service.broker import connect
from tokenrelay.service.embedded_valkey import EmbeddedValkey
from tokenrelay.service.keys import Keys
from tokenrelay.service.mailbox import Mailbox
from tokenrelay.service.queue import Queue
from tokenrelay.service.settings import Settings
from tokenrelay.service.token_log import TokenLog

ExpireLeases = Callable[[], Awaitable[None]]
WaitUntil = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    server = EmbeddedValkey(tmp_path_factory.mktemp("valkey"), memory_mb=64)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def url(valkey: EmbeddedValkey) -> Iterator[str]:
    """The broker; afterwards every key has a TTL or is one of the permanent ones."""
    yield valkey.url
    assert_nothing_stays(valkey.url)


def assert_nothing_stays(url: str) -> None:
    """Every key has a TTL or is one of the permanent ones; now they are gone."""
    with sync_redis.Redis.from_url(url) as client:
        everlasting = [key.decode() for key in client.scan_iter(count=1000) if client.ttl(key) == -1]
        client.flushall()
    assert [key for key in everlasting if key not in Keys(_model_of(key)).permanent] == []


def _model_of(key: str) -> str:
    return key.partition("{")[2].partition("}")[0]


@pytest.fixture
def settings() -> Settings:
    """Leases outlast any test: one expires when a test says so."""
    return Settings(lease_seconds=600)


@pytest.fixture
def keys() -> Keys:
    return Keys(f"model-{uuid.uuid4().hex}")


@pytest.fixture
async def redis(url: str) -> AsyncIterator[Redis]:
    async with connect(url) as client:
        yield client


@pytest.fixture
def queue(redis: Redis, keys: Keys, settings: Settings) -> Queue:
    return Queue(redis, keys, settings)


@pytest.fixture
def token_log(redis: Redis, keys: Keys, settings: Settings) -> TokenLog:
    return TokenLog(redis, keys, settings)


@pytest.fixture
async def mailbox(url: str, redis: Redis, keys: Keys, token_log: TokenLog) -> AsyncIterator[Mailbox]:
    """A running one, of the API process "api"."""
    async with connect(url, blocking=True) as blocking:
        box = Mailbox(blocking, redis, keys, token_log, "api")
        running = asyncio.create_task(box.run())
        yield box
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


@pytest.fixture
def wait_until() -> WaitUntil:
    async def wait(condition: Callable[[], Awaitable[bool]]) -> None:
        deadline = time.monotonic() + 60
        while not await condition():
            assert time.monotonic() < deadline, "the condition did not come true"
            await asyncio.sleep(0.005)

    return wait


@pytest.fixture
def expire_leases(redis: Redis, keys: Keys) -> ExpireLeases:
    """Every worker has been silent for too long."""

    async def expire() -> None:
        leased: Any = await redis.zrange(keys.leases, 0, -1)
        for name in leased:
            await redis.zadd(keys.leases, {name: 1})

    return expire
