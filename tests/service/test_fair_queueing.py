"""Who comes next: the priority class, then the tenant that had least of its share."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from tests.service.relay import claim_ids, submit
from tokenrelay.service.keys import Keys
from tokenrelay.service.queue import Queue
from tokenrelay.service.tenants import MAX_WEIGHT, MIN_WEIGHT


async def test_lower_priority_values_come_first(queue: Queue) -> None:
    for request_id, priority in [("later", 5), ("normal", 0), ("urgent", -5)]:
        await submit(queue, request_id, priority=priority)
    assert await claim_ids(queue) == ["urgent", "normal", "later"]


async def test_one_tenants_flood_cannot_starve_another(queue: Queue) -> None:
    await submit(queue, *(f"flood-{i}" for i in range(50)), tenant="noisy")
    await submit(queue, "quiet-0", "quiet-1", tenant="quiet")
    assert await queue.position("quiet-0") == 1
    assert await queue.position("quiet-1") == 3


async def test_a_tenant_that_was_idle_gets_no_credit_for_it(queue: Queue) -> None:
    await submit(queue, *(f"busy-{i}" for i in range(10)), tenant="busy")
    await queue.claim("worker", 8)
    await submit(queue, "new-0", "new-1", "new-2", tenant="new")
    assert [name.partition("-")[0] for name in await claim_ids(queue)] == ["new", "busy", "new", "busy", "new"]


async def test_within_the_last_class_too_the_first_comes_first(queue: Queue) -> None:
    await submit(queue, "b", "a", priority=1000)
    assert await claim_ids(queue) == ["b", "a"]


async def test_large_requests_cost_more_of_a_tenants_share(queue: Queue) -> None:
    await submit(queue, "large-0", "large-1", tenant="large", max_tokens=1000)
    await submit(queue, *(f"small-{i}" for i in range(5)), tenant="small", max_tokens=10)
    assert (await claim_ids(queue))[:5] == [f"small-{i}" for i in range(5)]


async def test_tenants_without_debt_leave_no_entry(queue: Queue, redis: Redis, keys: Keys) -> None:
    for i in range(20):
        await submit(queue, f"request-{i}", tenant=f"tenant-{i}", max_tokens=10 + i)
    await submit(queue, "last-0", "last-1", tenant="last", max_tokens=100)
    await queue.claim("worker", 100)
    assert await redis.zcard(keys.fair) <= 2
    assert await redis.zscore(keys.fair, "tenant:last")


async def test_weights_are_shares(queue: Queue) -> None:
    """Of any beginning of the queue, not only of all of it."""
    await submit(queue, *(f"light-{i}" for i in range(30)), tenant="light")
    await submit(queue, *(f"heavy-{i}" for i in range(30)), tenant="heavy", weight=3.0)
    order = [name.partition("-")[0] for name in await claim_ids(queue, limit=40)]
    for length in (8, 20, 40):
        assert order[:length].count("heavy") == pytest.approx(length * 3 / 4, abs=1)


@pytest.mark.parametrize("weight", [MIN_WEIGHT, MAX_WEIGHT])
async def test_the_order_has_room_for_every_weight(queue: Queue, weight: float) -> None:
    """Also a large request of the least weight stays in its class, and a small one of the greatest counts."""
    await submit(queue, "large", tenant="large", weight=weight, max_tokens=2**23)
    await submit(queue, "small-0", "small-1", tenant="small", weight=weight, max_tokens=1)
    await submit(queue, "later", tenant="other", priority=1)
    assert await claim_ids(queue) == ["small-0", "small-1", "large", "later"]
