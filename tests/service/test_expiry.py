"""Deadlines in the broker: its clock decides, one call ends all that are late, and nobody works on them any more."""

from __future__ import annotations

from typing import Any

from redis.asyncio import Redis

from tests.service.relay import claim_ids, claim_one, publication, submission, token
from tokenrelay.service.keys import Keys
from tokenrelay.service.mailbox import Mailbox
from tokenrelay.service.queue import CancelOutcome, Queue
from tokenrelay.service.terms import Terms
from tokenrelay.service.token_log import TokenLog


async def submit(queue: Queue, *names: str, seconds: float = 600) -> None:
    for name in names:
        await queue.submit(submission(name), mailbox="api", terms=Terms(timeout=seconds))


async def let_pass(redis: Redis, keys: Keys, *names: str) -> None:
    """Their deadlines."""
    for name in names:
        await redis.hset(keys.request(name), "deadline", 1)
        await redis.zadd(keys.deadlines, {name: 1}, xx=True)


async def end_of(token_log: TokenLog, name: str) -> tuple[int, str]:
    """The index and the error's code."""
    index, event = (await token_log.read(name))[-1]
    assert event.error
    assert event.error.status == 504
    return index, event.error.code


async def test_a_waiting_request_ends_and_leaves_the_queue(
    queue: Queue, token_log: TokenLog, redis: Redis, keys: Keys
) -> None:
    await submit(queue, "late", "early")
    await let_pass(redis, keys, "late")
    await queue.expire()
    assert await end_of(token_log, "late") == (1, "deadline_exceeded")
    assert await claim_ids(queue) == ["early"]
    assert await queue.cancel("late") is CancelOutcome.FINISHED


async def test_a_late_request_is_not_claimed_even_before_it_is_ended(queue: Queue, redis: Redis, keys: Keys) -> None:
    await submit(queue, "late", "early")
    await let_pass(redis, keys, "late")
    assert await claim_ids(queue) == ["early"]


async def test_a_running_request_ends_behind_what_it_emitted(
    queue: Queue, token_log: TokenLog, redis: Redis, keys: Keys
) -> None:
    await submit(queue, "a")
    claim = await claim_one(queue)
    await token_log.publish("worker", [publication(claim, 1, token(1), token(2))])
    await let_pass(redis, keys, "a")
    await queue.expire()
    assert await end_of(token_log, "a") == (3, "deadline_exceeded")
    assert await token_log.publish("worker", [publication(claim, 3, token(3))]) == ["a"]
    assert (await queue.renew("worker", {"a": claim.epoch})).lost == ["a"]
    assert await redis.zcard(keys.leases) == 0


async def test_its_worker_is_told_at_once(queue: Queue, redis: Redis, keys: Keys) -> None:
    await submit(queue, "a")
    await claim_one(queue)
    wakeups = queue.wakeups()
    assert await anext(wakeups) == "submit"
    await let_pass(redis, keys, "a")
    await queue.expire()
    assert await anext(wakeups) == "drop a"
    await wakeups.aclose()


async def test_who_waits_for_the_end_hears_of_it(queue: Queue, mailbox: Mailbox, redis: Redis, keys: Keys) -> None:
    async with mailbox.subscribe("a") as subscription:
        await submit(queue, "a")
        await let_pass(redis, keys, "a")
        await queue.expire()
        [(_, event)] = [entry async for entry in subscription]
        assert event.error


async def test_many_at_once(queue: Queue, token_log: TokenLog, redis: Redis, keys: Keys) -> None:
    """In batches, so that the broker is not busy with them for long."""
    names = [f"request-{i}" for i in range(100)]
    await submit(queue, *names)
    await let_pass(redis, keys, *names)
    for _ in range(2):
        await queue.expire()
    assert [await end_of(token_log, name) for name in names] == [(1, "deadline_exceeded")] * 100
    assert await redis.exists(keys.deadlines, keys.waiting) == 0


async def test_the_time_that_is_left(queue: Queue, redis: Redis, keys: Keys) -> None:
    await submit(queue, "a", seconds=600)
    await submit(queue, "b", seconds=0)
    left = await queue.expire("a")
    assert left is not None
    assert 599 < left <= 600
    assert await queue.expire("b") is None
    await let_pass(redis, keys, "a")
    assert await queue.expire("a") is None


async def test_what_ended_in_time_is_left_alone(queue: Queue, token_log: TokenLog, redis: Redis, keys: Keys) -> None:
    await submit(queue, "a")
    await queue.cancel("a")
    before: Any = await redis.hgetall(keys.request("a"))
    await redis.zadd(keys.deadlines, {"a": 1, "forgotten": 1})
    await queue.expire()
    assert await redis.hgetall(keys.request("a")) == before
    assert len(await token_log.read("a")) == 1
    assert await redis.exists(keys.deadlines) == 0


async def test_a_follower_knows_the_deadline(queue: Queue, token_log: TokenLog) -> None:
    await submit(queue, "a", seconds=600)
    await submit(queue, "b", seconds=0)
    remaining = (await token_log.follow("a", "other")).remaining
    assert remaining is not None
    assert 599 < remaining <= 600
    assert (await token_log.follow("b", "other")).remaining is None
