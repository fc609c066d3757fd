"""Readiness is what workers announced lately."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from tests.service.conftest import WaitUntil
from tokenrelay.service.keys import Keys
from tokenrelay.service.messages import WorkerFacts
from tokenrelay.service.registry import Registry
from tokenrelay.service.settings import Settings


def facts(worker_id: str, step_counter: int = 0) -> WorkerFacts:
    return WorkerFacts(worker_id=worker_id, model="model", max_model_len=2048, step_counter=step_counter)


@pytest.fixture
def registry(redis: Redis, keys: Keys, settings: Settings) -> Registry:
    return Registry(redis, keys, settings)


async def test_workers_announce_themselves(registry: Registry) -> None:
    assert await registry.workers() == []
    await registry.announce(facts("a"))
    await registry.announce(facts("b"))
    await registry.announce(facts("a", step_counter=7))
    assert sorted(await registry.workers(), key=lambda worker: worker.worker_id) == [facts("a", 7), facts("b")]


async def test_a_worker_that_leaves_says_so(registry: Registry) -> None:
    await registry.announce(facts("a"))
    await registry.withdraw("a")
    assert await registry.workers() == []


async def test_a_silent_worker_is_gone_after_three_announcements(
    redis: Redis, keys: Keys, registry: Registry, wait_until: WaitUntil
) -> None:
    await Registry(redis, keys, Settings(announce_seconds=0.01)).announce(facts("silent"))

    async def gone() -> bool:
        return await registry.workers() == []

    await wait_until(gone)
    await registry.announce(facts("next"))
    assert await redis.zrange(keys.workers, 0, -1) == [b"next"]


async def test_an_unreadable_announcement_counts_as_absent(redis: Redis, keys: Keys, registry: Registry) -> None:
    await registry.announce(facts("a"))
    await registry.announce(facts("b"))
    await redis.set(keys.worker("a"), b"\xc1", keepttl=True)
    assert await registry.workers() == [facts("b")]
