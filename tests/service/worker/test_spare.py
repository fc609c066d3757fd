"""A spare worker has its model loaded and claims nothing, until others are missing."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from tests.service.conftest import WaitUntil
from tests.service.relay import submit
from tests.service.worker.working import working
from tokenrelay.service.api.operations.readiness import Readiness
from tokenrelay.service.keys import Keys
from tokenrelay.service.messages import WorkerFacts
from tokenrelay.service.queue import Queue
from tokenrelay.service.registry import Registry
from tokenrelay.service.settings import Settings
from tokenrelay.service.token_log import TokenLog
from tokenrelay.service.worker.role import Role

SPARE = Role("spare", spare=True)


@pytest.fixture
def settings() -> Settings:
    """Leases outlast the test: what is taken over was given up at once."""
    return Settings(lease_seconds=600, announce_seconds=0.1, watchdog_seconds=0, drain_seconds=5)


@pytest.fixture
def registry(redis: Redis, keys: Keys, settings: Settings) -> Registry:
    return Registry(redis, keys, settings)


async def test_it_leaves_the_work_to_others(
    redis: Redis,
    keys: Keys,
    settings: Settings,
    queue: Queue,
    registry: Registry,
    wait_until: WaitUntil,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await registry.announce(WorkerFacts(worker_id="active", model="m", max_model_len=512, step_counter=1))
    looks = 0

    async with working(redis, keys, settings, SPARE) as spare:

        async def count() -> int:
            nonlocal looks
            looks += 1
            return 1

        monkeypatch.setattr(spare.worker._registry, "num_active", count)

        async def looked() -> bool:
            return looks > 3

        await submit(queue, "a")
        await wait_until(looked)
        assert await queue.num_waiting() == 1


async def test_it_takes_over_at_once_what_a_dead_worker_held(
    redis: Redis,
    keys: Keys,
    settings: Settings,
    queue: Queue,
    token_log: TokenLog,
    registry: Registry,
    wait_until: WaitUntil,
) -> None:
    """The supervisor saw the worker die, and evicts it."""
    dead = WorkerFacts(worker_id="dead", model="m", max_model_len=512, step_counter=1)
    await registry.announce(dead)
    await submit(queue, "a")
    assert len(await queue.claim("dead", 1)) == 1
    async with working(redis, keys, settings, SPARE):
        await queue.evict("dead")

        async def written() -> bool:
            return bool(await token_log.read("a"))

        await wait_until(written)


async def test_it_claims_when_a_worker_hangs_or_drains(
    redis: Redis, keys: Keys, settings: Settings, queue: Queue, wait_until: WaitUntil
) -> None:
    async with working(redis, keys, settings, SPARE) as spare, working(redis, keys, settings, Role("active")) as active:
        active.worker.drain()  # and claims no more
        spare.network.gate.clear()
        await submit(queue, "a")

        async def held() -> bool:
            return "a" in spare.held

        await wait_until(held)


async def test_two_workers_are_wanted_and_one_lives(
    redis: Redis, keys: Keys, settings: Settings, queue: Queue, registry: Registry, wait_until: WaitUntil
) -> None:
    two = settings.model_copy(update={"workers": 2})
    await registry.announce(WorkerFacts(worker_id="only", model="m", max_model_len=512, step_counter=1))
    async with working(redis, keys, two, SPARE) as spare:
        spare.network.gate.clear()
        await submit(queue, "a")

        async def held() -> bool:
            return "a" in spare.held

        await wait_until(held)


async def test_with_a_spare_one_left_the_service_is_ready(
    redis: Redis, keys: Keys, settings: Settings, registry: Registry, wait_until: WaitUntil
) -> None:
    readiness = Readiness(registry)
    assert await readiness.observe() == "no worker is running"

    async def ready() -> bool:
        return await readiness.observe() is None

    async with working(redis, keys, settings, SPARE):
        await wait_until(ready)
