"""A worker that is seen dead loses its requests at once; one that only seemed so can do no harm."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from tests.service.relay import claim_ids, claim_one, ending, publication, submit, token
from tokenrelay.service.keys import Keys
from tokenrelay.service.messages import WorkerFacts
from tokenrelay.service.queue import RECLAIM_BATCH, Queue, Renewal
from tokenrelay.service.registry import Registry
from tokenrelay.service.settings import Settings
from tokenrelay.service.token_log import TokenLog


async def test_its_requests_go_to_the_next_with_their_logs(queue: Queue, token_log: TokenLog) -> None:
    await submit(queue, "a", "b")
    first, _ = await queue.claim("dead", 2)
    await token_log.publish("dead", [publication(first, 1, token(1))])
    assert sorted(await queue.evict("dead")) == ["a", "b"]
    claims = await queue.claim("next", 2)
    assert [(claim.submission.request_id, claim.attempts, claim.log) for claim in claims] == [
        ("a", 2, [token(1)]),
        ("b", 2, []),
    ]


async def test_others_keep_theirs(queue: Queue) -> None:
    await submit(queue, "a", "b")
    await claim_one(queue, "dead")
    await claim_one(queue, "alive")
    assert await queue.evict("dead") == ["a"]
    assert await queue.renew("alive", {"b": 1}) == Renewal([], [])


async def test_it_is_announced_no_more(redis: Redis, keys: Keys, settings: Settings, queue: Queue) -> None:
    registry = Registry(redis, keys, settings)
    for worker_id in ("dead", "alive"):
        await registry.announce(WorkerFacts(worker_id=worker_id, model="m", max_model_len=1, step_counter=1))
    await queue.evict("dead")
    assert [worker.worker_id for worker in await registry.workers()] == ["alive"]
    assert await registry.num_active() == 1


async def test_a_worker_that_was_not_dead_is_fenced(queue: Queue, token_log: TokenLog) -> None:
    await submit(queue, "a")
    claim = await claim_one(queue, "paused")
    await queue.evict("paused")
    assert await token_log.publish("paused", [publication(claim, 1, token(1))]) == ["a"]
    assert not await token_log.finish("paused", publication(claim, 1, ending()))
    assert await queue.renew("paused", {"a": claim.epoch}) == Renewal(["a"], [])
    assert await claim_ids(queue, worker_id="next") == ["a"]


async def test_however_much_it_held(queue: Queue) -> None:
    names = [f"request-{i}" for i in range(RECLAIM_BATCH + 1)]
    await submit(queue, *names)
    await queue.claim("dead", len(names))
    assert sorted(await queue.evict("dead")) == sorted(names)


@pytest.mark.parametrize("worker_id", ["dead", "unknown"])
async def test_it_may_be_repeated(queue: Queue, worker_id: str) -> None:
    await submit(queue, "a")
    await claim_one(queue, "dead")
    await queue.evict("dead")
    assert await queue.evict(worker_id) == []
    assert await queue.num_waiting() == 1
