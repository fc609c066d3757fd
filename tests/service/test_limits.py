"""A tenant's limits: what is charged, refused, given back and counted, whatever becomes of its requests."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from tests.service.conftest import ExpireLeases
from tests.service.relay import claim_one, ending, publication, submission, token
from tokenrelay.service.allowance import Allowance
from tokenrelay.service.broker import connect
from tokenrelay.service.errors import RateLimited
from tokenrelay.service.keys import USAGE_TTL, Keys
from tokenrelay.service.messages import Event, Usage
from tokenrelay.service.queue import Queue, Submitted
from tokenrelay.service.settings import Settings
from tokenrelay.service.tenants import Limits
from tokenrelay.service.terms import Terms
from tokenrelay.service.token_log import TokenLog
from tokenrelay.service.usage import UsageLedger, Used

MINUTE = 60_000  # milliseconds


async def send(
    queue: Queue, request_id: str, limits: Limits, *, tenant: str = "alice", max_tokens: int = 7
) -> Submitted:
    """It may take ten tokens: three of the prompt, seven of the answer."""
    request = submission(request_id, tenant=tenant, max_tokens=max_tokens)
    return await queue.submit(request, mailbox="api", terms=Terms(limits=limits))


async def refusal(queue: Queue, request_id: str, limits: Limits, **fields: Any) -> RateLimited:
    with pytest.raises(RateLimited) as refused:
        await send(queue, request_id, limits, **fields)
    return refused.value


def left(submitted: Submitted) -> Allowance:
    assert submitted.allowance
    return submitted.allowance


async def pass_time(redis: Redis, keys: Keys, ms: float, tenant: str = "alice") -> None:
    """As if the tenant had done nothing for so long."""
    buckets: Any = await redis.hgetall(keys.limits(tenant))
    for name, full_at in buckets.items():
        await redis.hset(keys.limits(tenant), name, f"{float(full_at) - ms:.3f}")


async def end(queue: Queue, token_log: TokenLog, *, completion_tokens: int) -> None:
    claim = await claim_one(queue)
    assert await token_log.finish("worker", publication(claim, 1, ending(completion_tokens)))


@pytest.fixture
def ledger(redis: Redis, keys: Keys) -> UsageLedger:
    return UsageLedger(redis, keys)


class TestRequestsPerMinute:
    LIMITS = Limits(requests_per_minute=3)

    async def test_so_many_at_once_then_one_for_every_third_of_a_minute(
        self, queue: Queue, redis: Redis, keys: Keys
    ) -> None:
        told = [left(await send(queue, name, self.LIMITS)).requests_left for name in "abc"]
        assert told == [2, 1, 0]
        refused = await refusal(queue, "d", self.LIMITS)
        assert refused.retry_after == pytest.approx(20, abs=5)
        assert (refused.status, refused.code) == (429, "rate_limit_exceeded")
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert refused.headers["x-ratelimit-limit-requests"] == "3"
        await pass_time(redis, keys, 1000 * (refused.retry_after or 0))
        await send(queue, "d", self.LIMITS)
        await refusal(queue, "e", self.LIMITS)

    async def test_a_submission_sent_again_after_a_lost_reply_is_charged_once(self, queue: Queue) -> None:
        for _ in range(5):
            assert (await send(queue, "a", self.LIMITS)).created
        assert left(await send(queue, "b", self.LIMITS)).requests_left == 1

    async def test_what_is_refused_is_not_charged(self, queue: Queue, redis: Redis, keys: Keys) -> None:
        for name in "abc":
            await send(queue, name, self.LIMITS)
        before = await redis.hgetall(keys.limits("alice"))
        await refusal(queue, "d", self.LIMITS)
        assert await redis.hgetall(keys.limits("alice")) == before
        assert not await redis.exists(keys.request("d"))

    async def test_one_tenant_s_limit_is_not_another_s(self, queue: Queue) -> None:
        for name in "abc":
            await send(queue, name, self.LIMITS)
        await send(queue, "d", self.LIMITS, tenant="bob")

    async def test_nothing_is_kept_of_a_tenant_that_is_idle(self, queue: Queue, redis: Redis, keys: Keys) -> None:
        await send(queue, "a", Limits(requests_per_minute=600))
        assert 0 < await redis.pttl(keys.limits("alice")) <= 100
        await send(queue, "b", self.LIMITS)
        assert 0 < await redis.pttl(keys.limits("alice")) <= MINUTE

    async def test_without_limits_nothing_is_kept_at_all(self, queue: Queue, redis: Redis, keys: Keys) -> None:
        assert left(await send(queue, "a", Limits())).headers == {}
        assert not await redis.exists(keys.limits("alice"), keys.live("alice"))


class TestTokensPerMinute:
    LIMITS = Limits(tokens_per_minute=20)

    async def test_what_a_request_might_take_is_charged(self, queue: Queue) -> None:
        assert left(await send(queue, "a", self.LIMITS)).tokens_left == 10
        assert left(await send(queue, "b", self.LIMITS)).tokens_left == 0
        refused = await refusal(queue, "c", self.LIMITS)
        assert refused.retry_after == pytest.approx(30, abs=5)
        assert "10 tokens" in refused.message
        assert refused.headers["x-ratelimit-reset-tokens"].startswith(("1m", "5"))

    async def test_what_it_did_not_take_is_given_back(self, queue: Queue, token_log: TokenLog) -> None:
        await send(queue, "a", self.LIMITS, max_tokens=17)
        await end(queue, token_log, completion_tokens=2)
        assert left(await send(queue, "b", self.LIMITS)).tokens_left == pytest.approx(5, abs=2)  # 20 − 3 − 2 − 10

    async def test_what_was_never_begun_is_given_back_in_full(self, queue: Queue) -> None:
        for name in "abcdef":
            await send(queue, name, self.LIMITS, max_tokens=17)
            await queue.cancel(name)

    async def test_a_deadline_gives_back_only_what_was_not_emitted(
        self, queue: Queue, token_log: TokenLog, redis: Redis, keys: Keys, ledger: UsageLedger
    ) -> None:
        """Or a deadline would be a way around the limit."""
        await send(queue, "a", self.LIMITS, max_tokens=17)
        claim = await claim_one(queue)
        step = publication(claim, 1, Event(token_ids=[1, 2, 3]), token(4))
        for _ in range(2):  # sent again after a lost reply
            await token_log.publish("worker", [step])
        await redis.hset(keys.request("a"), "deadline", 1)
        await redis.zadd(keys.deadlines, {"a": 1})
        await queue.expire()
        assert await ledger.total("alice") == Used(1, 3, 0, 4)
        assert left(await send(queue, "b", self.LIMITS)).tokens_left == pytest.approx(3, abs=2)  # 20 − 3 − 4 − 10


class TestConcurrentRequests:
    LIMITS = Limits(concurrent_requests=2)

    async def test_waiting_and_running_ones_count(self, queue: Queue, token_log: TokenLog) -> None:
        await send(queue, "a", self.LIMITS)
        await claim_one(queue)
        await send(queue, "b", self.LIMITS)
        refused = await refusal(queue, "c", self.LIMITS)
        assert refused.retry_after == 1
        await send(queue, "d", self.LIMITS, tenant="bob")

    async def test_whatever_ends_a_request_makes_room(
        self, queue: Queue, token_log: TokenLog, redis: Redis, keys: Keys, expire_leases: ExpireLeases
    ) -> None:
        one = Limits(concurrent_requests=1)
        await send(queue, "finished", one)
        await end(queue, token_log, completion_tokens=1)
        await send(queue, "cancelled", one)
        await queue.cancel("cancelled")
        await send(queue, "late", one)
        await redis.hset(keys.request("late"), "deadline", 1)
        await redis.zadd(keys.deadlines, {"late": 1})
        await queue.expire()
        await send(queue, "poison", one)
        for _ in range(3):
            await claim_one(queue)
            await expire_leases()
            await queue.reclaim()
        await send(queue, "gone", one)
        await redis.delete(keys.request("gone"))  # as when nobody had looked at it for a day
        await send(queue, "next", one)
        await refusal(queue, "one too many", one)

    async def test_a_request_that_is_handed_on_counts_once(self, queue: Queue, expire_leases: ExpireLeases) -> None:
        await send(queue, "a", self.LIMITS)
        await claim_one(queue)
        await expire_leases()
        await queue.reclaim()
        await claim_one(queue)
        await send(queue, "b", self.LIMITS)
        await refusal(queue, "c", self.LIMITS)


class TestUsage:
    async def test_it_is_counted_once_by_tenant_and_day(
        self, queue: Queue, token_log: TokenLog, redis: Redis, keys: Keys, ledger: UsageLedger
    ) -> None:
        for i, tenant in enumerate(("alice", "alice", "bob")):
            await send(queue, f"request-{i}", Limits(), tenant=tenant)
            claim = await claim_one(queue)
            usage = Usage(prompt_tokens=3, completion_tokens=5, cached_tokens=2)
            step = publication(claim, 1, Event(finish_reason="stop", usage=usage))
            for _ in range(2):
                assert await token_log.finish("worker", step)
        assert await ledger.total("alice") == Used(2, 6, 4, 10)
        today, yesterday = (await ledger.by_day("alice", 2)).values()
        assert (today, yesterday) == (Used(2, 6, 4, 10), Used())
        assert await ledger.total("nobody") == Used()
        [day] = [key async for key in redis.scan_iter(f"{keys.usage}:*")]
        assert 0 < await redis.ttl(day) <= USAGE_TTL

    async def test_a_request_nobody_began_used_nothing(self, queue: Queue, ledger: UsageLedger) -> None:
        await send(queue, "a", Limits())
        for _ in range(2):
            await queue.cancel("a")
        assert await ledger.total("alice") == Used(requests=1)


class Bucket:
    """The model: a level that falls steadily, as tokens rather than as times."""

    def __init__(self, limit: int) -> None:
        self.limit, self.level, self.at = limit, 0.0, 0.0

    def fall_until(self, at: float) -> None:
        self.level = max(0.0, self.level - (at - self.at) * self.limit / MINUTE)
        self.at = at

    def room(self) -> float:
        return self.limit - self.level


ACTIONS = st.one_of(
    st.tuples(st.just("send"), st.integers(1, 37)),
    st.tuples(st.just("end"), st.integers(0, 37)),
    st.tuples(st.just("cancel"), st.just(0)),
    st.tuples(st.just("wait"), st.integers(0, 90_000)),
    st.tuples(st.just("vanish"), st.just(0)),
)


class Machine:
    """One tenant and the model of its limits, whose clock is the broker's."""

    LIMITS = Limits(requests_per_minute=4, tokens_per_minute=60, concurrent_requests=3)
    SLACK = 0.2  # tokens or requests: what the broker's milliseconds between two commands are worth, on a busy machine

    def __init__(self, redis: Redis, name: str) -> None:
        self.redis, self.keys = redis, Keys(name)
        relay = (redis, self.keys, Settings(lease_seconds=600))
        self.queue, self.log = Queue(*relay), TokenLog(*relay)
        self.requests = Bucket(self.LIMITS.requests_per_minute)
        self.tokens = Bucket(self.LIMITS.tokens_per_minute)
        self.live: dict[str, int] = {}  # id → what it might take
        self.waited = 0.0
        self.count = 0

    async def now(self) -> float:
        seconds, microseconds = await self.redis.time()
        return float(seconds * 1000 + microseconds / 1000 + self.waited)

    async def fall(self) -> None:
        at = await self.now()
        self.requests.fall_until(at)
        self.tokens.fall_until(at)

    async def send(self, max_tokens: int) -> None:
        self.count += 1
        name, cost = f"request-{self.count}", 3 + max_tokens
        await self.fall()
        asked_at, before = self.tokens.at, (self.requests.room(), self.tokens.room())
        has_room = before[0] >= 1 + self.SLACK and before[1] >= cost + self.SLACK and len(self.live) < 3
        told, refused = None, None
        try:
            told = left(await send(self.queue, name, self.LIMITS, max_tokens=max_tokens))
        except RateLimited as error:
            refused = error
        await self.fall()
        assume(self.tokens.at - asked_at < 100)  # or this machine made a pause
        if refused:
            assert not has_room
            self.check_wait(refused, cost)
            return
        assert told
        assert self.requests.room() >= 1 - self.SLACK
        assert self.tokens.room() >= cost - self.SLACK
        assert len(self.live) < 3
        self.requests.level, self.tokens.level = self.requests.level + 1, self.tokens.level + cost
        self.live[name] = cost
        assert before[0] - 1 - 1 - self.SLACK <= told.requests_left <= self.requests.room() + self.SLACK
        assert before[1] - cost - 1 - self.SLACK <= told.tokens_left <= self.tokens.room() + self.SLACK

    def check_wait(self, refused: RateLimited, cost: int) -> None:
        """After the time it tells, and not before, there would be room."""
        if len(self.live) == 3:
            assert refused.retry_after == 1
            return
        waits = (
            (1 - self.requests.room()) / self.requests.limit * 60,
            (cost - self.tokens.room()) / self.tokens.limit * 60,
        )
        slack = max(self.SLACK / bucket.limit * 60 for bucket in (self.requests, self.tokens))
        assert refused.retry_after == pytest.approx(max(waits), abs=slack)

    async def end(self, completion_tokens: int) -> None:
        for claim in await self.queue.claim("worker", 1):
            name = claim.submission.request_id
            used = 3 + min(completion_tokens, claim.submission.params.max_tokens)
            assert await self.log.finish("worker", publication(claim, 1, ending(used - 3)))
            await self.give_back(self.live.pop(name) - used)

    async def cancel(self, _: int) -> None:
        waiting: Any = await self.redis.zrange(self.keys.waiting, 0, 0)
        for name in waiting:
            await self.queue.cancel(name.decode())
            await self.give_back(self.live.pop(name.decode()))

    async def give_back(self, tokens: int) -> None:
        await self.fall()
        self.tokens.level = max(0.0, self.tokens.level - tokens)

    async def wait(self, ms: int) -> None:
        await pass_time(self.redis, self.keys, ms)
        self.waited += ms

    async def vanish(self, _: int) -> None:
        """A request's time to live is over: nobody ended it, and nothing is given back."""
        for name in sorted(self.live)[:1]:
            await self.redis.delete(self.keys.request(name), self.keys.log(name))
            await self.redis.zrem(self.keys.waiting, name)
            del self.live[name]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(actions=st.lists(ACTIONS, min_size=5, max_size=30))
def test_whatever_happens_the_limits_are_those_of_the_model(url: str, actions: list[tuple[str, int]]) -> None:
    async def run() -> None:
        async with connect(url) as redis:
            await redis.flushall()
            machine = Machine(redis, "model")
            for name, argument in actions:
                await getattr(machine, name)(argument)

    asyncio.run(run())
