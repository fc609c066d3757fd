"""What waits is counted exactly and bounded; whoever is refused is told how long the queue takes to drain."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.service.relay import (
    claim_ids,
    claim_one,
    ending,
    measured,
    nothing_ended_for,
    publication,
    submission,
    submit,
)
from tokenrelay.service.broker import connect
from tokenrelay.service.embedded_valkey import EmbeddedValkey
from tokenrelay.service.errors import DeadlineUnreachable, QueueFull, RateLimited, ServiceError
from tokenrelay.service.keys import Keys
from tokenrelay.service.load import AtWork, Load, Place
from tokenrelay.service.messages import encode
from tokenrelay.service.queue import Queue
from tokenrelay.service.settings import Settings
from tokenrelay.service.tenants import DEFAULT_TENANT
from tokenrelay.service.terms import Terms
from tokenrelay.service.token_log import Progress, TokenLog

COST = submission("a").cost  # 3 tokens of prompt, up to 10 more
BYTES = len(encode(submission("a")))

Books = dict[str, int]


async def books(redis: Redis, keys: Keys) -> Books:
    """The sums the broker keeps."""
    sums: Any = await redis.hgetall(keys.load)
    return {name.decode(): int(value) for name, value in sums.items()}


async def work_off(queue: Queue, token_log: TokenLog, limit: int) -> None:
    """Claim and finish so many."""
    for claim in await queue.claim("worker", limit):
        assert await token_log.finish("worker", publication(claim, len(claim.log) + 1, ending()))


class TestLimits:
    """One request of 13 tokens and some bytes waits; a second of the same kind is one too many."""

    @pytest.mark.parametrize(
        ("limit", "error"),
        [
            ({"max_waiting": 1}, QueueFull),
            ({"max_waiting_tokens": 2 * COST - 1}, QueueFull),
            ({"max_waiting_bytes": 2 * BYTES - 1}, QueueFull),
            ({"max_waiting_per_tenant": 1}, RateLimited),
            ({"max_waiting_tokens_per_tenant": 2 * COST - 1}, RateLimited),
        ],
    )
    async def test_each_refuses_and_recovers(
        self, redis: Redis, keys: Keys, token_log: TokenLog, limit: dict[str, Any], error: type[ServiceError]
    ) -> None:
        queue = Queue(redis, keys, Settings(**limit))
        await submit(queue, "a")
        before = await books(redis, keys)
        with pytest.raises(error) as refusal:
            await submit(queue, "b")
        assert refusal.value.retryable
        assert refusal.value.retry_after
        assert await books(redis, keys) == before
        assert not await redis.exists(keys.request("b"))
        await work_off(queue, token_log, 1)
        await submit(queue, "b")

    @pytest.mark.parametrize("limit", ["max_waiting_tokens", "max_waiting_bytes", "max_waiting_tokens_per_tenant"])
    async def test_nothing_is_too_large_for_an_empty_queue(self, redis: Redis, keys: Keys, limit: str) -> None:
        setting: dict[str, Any] = {limit: 1}
        await submit(Queue(redis, keys, Settings(**setting)), "a")

    async def test_a_tenants_limit_is_no_other_tenants(self, redis: Redis, keys: Keys) -> None:
        queue = Queue(redis, keys, Settings(max_waiting_per_tenant=2))
        await submit(queue, "a-0", "a-1", tenant="a")
        await submit(queue, "b-0", "b-1", tenant="b")
        for tenant in "ab":
            with pytest.raises(RateLimited):
                await submit(queue, "one more", tenant=tenant)

    async def test_a_tenant_at_its_limit_hears_of_that_one_first(self, redis: Redis, keys: Keys) -> None:
        queue = Queue(redis, keys, Settings(max_waiting=1, max_waiting_per_tenant=1))
        await submit(queue, "a")
        with pytest.raises(RateLimited):
            await submit(queue, "b")

    async def test_what_is_handed_back_is_never_refused(self, redis: Redis, keys: Keys) -> None:
        queue = Queue(redis, keys, Settings(max_waiting=1))
        await submit(queue, "a")
        claim = await claim_one(queue)
        await submit(queue, "b")
        await queue.release("worker", "a", claim.epoch)
        assert await books(redis, keys) == {
            "tokens": 2 * COST,
            "bytes": 2 * BYTES,
            "requests:default": 2,
            "tokens:default": 2 * COST,
        }
        assert await claim_ids(queue) == ["a", "b"]
        assert await books(redis, keys) == {}

    async def test_while_it_refuses_the_queue_is_asked_before_work_is_done(
        self, redis: Redis, keys: Keys, token_log: TokenLog
    ) -> None:
        queue = Queue(redis, keys, Settings(max_waiting=1))
        await submit(queue, "a")
        await queue.load.require_room(DEFAULT_TENANT)  # not asked yet: nothing was refused
        with pytest.raises(QueueFull):
            await submit(queue, "b")
        with pytest.raises(QueueFull):
            await queue.load.require_room(DEFAULT_TENANT)
        await work_off(queue, token_log, 1)
        await queue.load.require_room(DEFAULT_TENANT)


class TestRetryAfter:
    async def test_it_is_what_waits_over_the_measured_rate(self, redis: Redis, keys: Keys) -> None:
        queue = Queue(redis, keys, Settings(max_waiting=4))
        await submit(queue, *"abcd")
        await measured(redis, keys, tokens_per_second=2 * COST)
        with pytest.raises(QueueFull) as refusal:
            await submit(queue, "e")
        assert refusal.value.retry_after == pytest.approx(2, rel=0.01)
        assert "within about 2 s" in refusal.value.message

    async def test_a_tenant_waits_for_its_fair_share_only(self, redis: Redis, keys: Keys) -> None:
        """Ten requests of another wait as well, and one of them is served for each of this tenant's."""
        queue = Queue(redis, keys, Settings(max_waiting_per_tenant=2))
        await submit(queue, *(f"flood-{i}" for i in range(2)), tenant="flood")
        await submit(Queue(redis, keys, Settings()), *(f"flood-{i}" for i in range(2, 10)), tenant="flood")
        await submit(queue, "a", "b", tenant="small")
        await measured(redis, keys, tokens_per_second=COST)
        with pytest.raises(RateLimited) as refusal:
            await submit(queue, "c", tenant="small")
        assert refusal.value.retry_after == pytest.approx(4, rel=0.01)

    async def test_before_any_work_ended_all_that_runs_is_taken_to_end_now(self, redis: Redis, keys: Keys) -> None:
        queue = Queue(redis, keys, Settings())
        await submit(queue, *"abcdef")
        await queue.claim("worker", 2)
        await nothing_ended_for(redis, keys, seconds=5)
        assert (await queue.load.read()).estimated_wait == pytest.approx(5 * 4 / 2, rel=0.05)

    async def test_before_any_work_began_it_may_take_as_long_again(
        self, redis: Redis, keys: Keys, queue: Queue
    ) -> None:
        assert (await queue.load.read()).estimated_wait == 0
        await submit(queue, *"abc")
        await nothing_ended_for(redis, keys, seconds=5)
        assert (await queue.load.read()).estimated_wait == pytest.approx(5, rel=0.05)

    async def test_a_standstill_makes_it_longer(self, redis: Redis, keys: Keys, queue: Queue) -> None:
        await submit(queue, *"abcd")
        await measured(redis, keys, tokens_per_second=COST)
        assert (await queue.load.read()).estimated_wait == pytest.approx(4, rel=0.01)
        await nothing_ended_for(redis, keys, seconds=60)
        assert 2 * 4 < (await queue.load.read()).estimated_wait < 4 * 4
        await nothing_ended_for(redis, keys, seconds=3600)
        assert (await queue.load.read()).estimated_wait == math.inf

    async def test_a_pause_without_demand_does_not(self, redis: Redis, keys: Keys, queue: Queue) -> None:
        await measured(redis, keys, tokens_per_second=COST)
        await submit(queue, "a")
        await queue.claim("worker", 1)
        assert await redis.hget(keys.drain, "since") is None
        await submit(queue, *"bcde")
        assert (await queue.load.read()).estimated_wait == pytest.approx(4, rel=0.01)


class Pace:
    """A worker of known speed: so many at a time, each for so long."""

    def __init__(self, queue: Queue, token_log: TokenLog, slots: int, seconds: float) -> None:
        self._queue, self._token_log = queue, token_log
        self._slots, self._seconds = slots, seconds
        self._claimed: defaultdict[str, asyncio.Future[float]] = defaultdict(asyncio.Future)

    async def claimed(self, request_id: str) -> float:
        """When it was claimed, once it is."""
        return await self._claimed[request_id]

    async def run(self) -> None:
        await asyncio.gather(*(self._slot(f"worker-{i}") for i in range(self._slots)))

    async def _slot(self, worker_id: str) -> None:
        while True:
            for claim in await self._queue.claim(worker_id, 1):
                self._claimed[claim.submission.request_id].set_result(time.monotonic())
                await asyncio.sleep(self._seconds)
                await self._token_log.finish(worker_id, publication(claim, 1, ending()))
            await asyncio.sleep(0)


@pytest.mark.parametrize("used", [1.0, 0.1])
async def test_the_estimate_is_the_real_wait_whatever_share_of_max_tokens_is_used(
    queue: Queue, token_log: TokenLog, used: float
) -> None:
    """60 requests a second are worked off, and 59 wait when the estimate is made."""
    pace = Pace(queue, token_log, slots=3, seconds=0.05)
    running = asyncio.create_task(pace.run())
    for i in range(90):
        await submit(queue, f"request-{i}", max_tokens=round(100 / used))
    async with asyncio.timeout(60):
        asked_at = await pace.claimed("request-30")
        load = await queue.load.read()
        [place] = (await queue.load.whereabouts(["request-89"])).values()
        waited = await pace.claimed("request-89") - asked_at
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    assert load.estimated_wait / 2 < waited < 2 * load.estimated_wait
    assert isinstance(place, Place)
    assert place.estimated_wait == pytest.approx(load.estimated_wait, rel=0.2)


class TestDeadline:
    """Four requests wait, one per second is worked off."""

    @pytest.fixture
    async def busy(self, queue: Queue, redis: Redis, keys: Keys) -> Queue:
        await submit(queue, *"abcd")
        await measured(redis, keys, tokens_per_second=COST)
        return queue

    async def test_what_could_not_start_in_time_is_refused(self, busy: Queue, redis: Redis, keys: Keys) -> None:
        with pytest.raises(DeadlineUnreachable) as refusal:
            await busy.submit(submission("late"), mailbox="api", terms=Terms(timeout=2))
        assert refusal.value.retry_after == pytest.approx(4, rel=0.01)
        assert refusal.value.status == 503
        assert not await redis.exists(keys.request("late"))

    async def test_what_could_is_accepted(self, busy: Queue) -> None:
        assert (await busy.submit(submission("early"), mailbox="api", terms=Terms(timeout=5))).created

    async def test_only_what_is_ahead_counts(self, busy: Queue) -> None:
        urgent = submission("urgent", priority=-1)
        assert (await busy.submit(urgent, mailbox="api", terms=Terms(timeout=1))).position == 0

    async def test_nothing_is_refused_on_a_guess(self, queue: Queue) -> None:
        await submit(queue, *"abcd")
        assert (await queue.submit(submission("e"), mailbox="api", terms=Terms(timeout=0.1))).created


async def test_whereabouts(queue: Queue, token_log: TokenLog, redis: Redis, keys: Keys) -> None:
    await submit(queue, *"abc")
    claim = await claim_one(queue)
    progress = Progress(claim.epoch, 2, 0, True, num_cached_prompt_tokens=1)
    await token_log.report("worker", {"a": progress})
    await measured(redis, keys, tokens_per_second=COST)
    found = await queue.load.whereabouts(["a", "b", "c", "nobody"])
    assert found.keys() == {"a", "b", "c"}
    assert isinstance(found["a"], AtWork)
    assert found["a"] == AtWork(2, 1, found["a"].seconds)
    assert 0 <= found["a"].seconds < 10
    for position, place in enumerate((found["b"], found["c"])):
        assert isinstance(place, Place)
        assert place == pytest.approx((position, position + 1), rel=0.01)


@pytest.fixture
async def mortal(tmp_path: Path) -> AsyncIterator[tuple[EmbeddedValkey, Redis]]:
    server = EmbeddedValkey(tmp_path, memory_mb=32)
    async with connect(server.start()) as client:
        yield server, client
    server.stop()


async def test_the_books_survive_the_brokers_death(
    mortal: tuple[EmbeddedValkey, Redis], keys: Keys, settings: Settings
) -> None:
    server, redis = mortal
    queue, token_log = Queue(redis, keys, settings), TokenLog(redis, keys, settings)
    await submit(queue, *(f"a-{i}" for i in range(5)), tenant="a")
    await submit(queue, *(f"b-{i}" for i in range(5)), tenant="b", max_tokens=100)
    await work_off(queue, token_log, 2)
    await queue.claim("worker", 2)
    await queue.cancel("b-4")
    before, load = await books(redis, keys), await queue.load.read()
    assert before["requests:a"] + before["requests:b"] == 5
    assert server.pid
    os.kill(server.pid, signal.SIGKILL)
    server.wait(60)
    server.start()
    assert await books(redis, keys) == before
    assert (await queue.load.read())[:3] == load[:3] == Load(5, before["tokens"], before["bytes"], 0)[:3]
    await queue.claim("worker", 10)
    assert await books(redis, keys) == {}
