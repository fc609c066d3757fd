"""What a client saw is in the log, once per index, written by the owner only."""

from __future__ import annotations

from typing import Any

import pytest
from redis.asyncio import Redis

from tests.service.conftest import ExpireLeases
from tests.service.relay import claim_one, ending, publication, submission, submit, token
from tokenrelay.service.errors import NotFoundError
from tokenrelay.service.keys import Keys
from tokenrelay.service.messages import Event, decode_deliveries
from tokenrelay.service.queue import Claim, Queue
from tokenrelay.service.settings import Settings
from tokenrelay.service.terms import Terms
from tokenrelay.service.token_log import Publication, Tail, TokenLog


@pytest.fixture
async def claim(queue: Queue) -> Claim:
    """The request "a", given to "worker"."""
    await submit(queue, "a")
    return await claim_one(queue)


class TestPublish:
    async def test_events_are_read_in_order_from_any_index(self, token_log: TokenLog, claim: Claim) -> None:
        assert await token_log.publish("worker", [publication(claim, 1, token(1), token(2))]) == []
        assert await token_log.publish("worker", [publication(claim, 3, token(3))]) == []
        assert await token_log.read("a") == [(1, token(1)), (2, token(2)), (3, token(3))]
        assert await token_log.read("a", after=2) == [(3, token(3))]
        assert await token_log.read("a", after=1, limit=1) == [(2, token(2))]

    async def test_a_repetition_is_accepted_and_changes_nothing(self, token_log: TokenLog, claim: Claim) -> None:
        for _ in range(2):
            assert await token_log.publish("worker", [publication(claim, 1, token(1), token(2))]) == []
        assert await token_log.publish("worker", [publication(claim, 2, token(2), token(3))]) == []
        assert await token_log.publish("worker", [publication(claim, 1, token(1))]) == []
        assert await token_log.publish("worker", [publication(claim, 4, token(4))]) == []
        assert [index for index, _ in await token_log.read("a")] == [1, 2, 3, 4]

    async def test_a_gap_is_refused(self, token_log: TokenLog, claim: Claim) -> None:
        assert await token_log.publish("worker", [publication(claim, 2, token(2))]) == ["a"]
        assert await token_log.read("a") == []

    async def test_a_stranger_and_an_old_epoch_are_refused(self, token_log: TokenLog, claim: Claim) -> None:
        assert await token_log.publish("stranger", [publication(claim, 1, token(1))]) == ["a"]
        old = Publication("a", claim.epoch - 1, 1, [token(1)])
        assert await token_log.publish("worker", [old, Publication("nothing", 1, 1, [token(1)])]) == ["a", "nothing"]
        assert await token_log.read("a") == []

    async def test_a_worker_that_slept_through_its_lease_is_refused(
        self, queue: Queue, token_log: TokenLog, claim: Claim, expire_leases: ExpireLeases
    ) -> None:
        """Also when it claimed the same request again: the epoch tells its two lives apart."""
        await expire_leases()
        await queue.reclaim()
        assert await token_log.publish("worker", [publication(claim, 1, token(1))]) == ["a"]
        again = await claim_one(queue)
        assert await token_log.publish("worker", [publication(claim, 1, token(1))]) == ["a"]
        assert await token_log.publish("worker", [publication(again, 1, token(1))]) == []

    async def test_one_refusal_does_not_hold_up_the_others(self, queue: Queue, token_log: TokenLog) -> None:
        await submit(queue, "a", "b", "c")
        a, b, c = await queue.claim("worker", 3)
        step = [publication(a, 1, token(1)), publication(b, 7, token(2)), publication(c, 1, token(3))]
        assert await token_log.publish("worker", step) == ["b"]
        assert await token_log.read("c") == [(1, token(3))]

    async def test_one_entry_per_mailbox_and_step(
        self, queue: Queue, token_log: TokenLog, redis: Redis, keys: Keys
    ) -> None:
        names = [f"request-{i}" for i in range(300)]  # more than an array header of one byte can count
        for name in ("api", "other"):
            await redis.xadd(keys.mailbox(name), {"d": b"\x90"}, id="0-*")
            await redis.expire(keys.mailbox(name), 60)
        await submit(queue, *names)
        for _ in range(2):
            await token_log.follow("request-7", "other")
        step = [publication(claim, 1, token(1)) for claim in await queue.claim("worker", len(names))]
        assert await token_log.publish("worker", step) == []
        entries: Any = await redis.xrange(keys.mailbox("api"))
        assert [delivery.request_id for delivery in decode_deliveries(entries[1][1][b"d"])] == names
        entries = await redis.xrange(keys.mailbox("other"))
        [delivery] = decode_deliveries(entries[1][1][b"d"])
        assert (delivery.request_id, delivery.index, delivery.event) == ("request-7", 1, token(1))

    async def test_a_mailbox_nobody_reads_is_not_created(
        self, token_log: TokenLog, claim: Claim, redis: Redis, keys: Keys
    ) -> None:
        await token_log.publish("worker", [publication(claim, 1, token(1))])
        assert not await redis.exists(keys.mailbox("api"))

    async def test_scripts_come_back_after_the_broker_forgot_them(
        self, token_log: TokenLog, claim: Claim, redis: Redis
    ) -> None:
        await token_log.publish("worker", [publication(claim, 1, token(1))])
        await redis.script_flush()
        assert await token_log.publish("worker", [publication(claim, 2, token(2))]) == []

    async def test_any_text_survives(self, token_log: TokenLog, claim: Claim) -> None:
        event = Event(token_ids=list(range(70_000)), text="\x00\xff 漢字 🚀" * 1000)
        await token_log.publish("worker", [publication(claim, 1, event)])
        assert await token_log.read("a") == [(1, event)]


class TestFinish:
    async def test_it_ends_lease_prompt_and_log(
        self, queue: Queue, token_log: TokenLog, claim: Claim, redis: Redis, keys: Keys, settings: Settings
    ) -> None:
        await token_log.publish("worker", [publication(claim, 1, token(1))])
        assert await token_log.finish("worker", publication(claim, 2, token(2), ending(2)))
        assert [index for index, _ in await token_log.read("a")] == [1, 2, 3]
        assert await redis.zcard(keys.leases) == 0
        assert not await redis.hexists(keys.request("a"), "payload")
        for key in (keys.request("a"), keys.log("a")):
            assert 0 < await redis.ttl(key) <= settings.retention_seconds

    async def test_a_repetition_is_accepted(self, token_log: TokenLog, claim: Claim) -> None:
        for _ in range(2):
            assert await token_log.finish("worker", publication(claim, 1, token(1), ending(1)))
        assert [index for index, _ in await token_log.read("a")] == [1, 2]

    async def test_a_repetition_is_buried_once(
        self, token_log: TokenLog, claim: Claim, redis: Redis, keys: Keys
    ) -> None:
        for _ in range(2):
            assert await token_log.finish("worker", publication(claim, 1, ending()), bury="poison")
        assert await redis.xlen(keys.dead) == 1

    async def test_nothing_follows_the_terminal_event(self, token_log: TokenLog, claim: Claim) -> None:
        await token_log.finish("worker", publication(claim, 1, ending()))
        assert await token_log.publish("worker", [publication(claim, 2, token(2))]) == ["a"]
        assert not await token_log.finish("worker", publication(claim, 2, ending()))
        assert len(await token_log.read("a")) == 1

    async def test_it_is_fenced_like_publish(self, token_log: TokenLog, claim: Claim) -> None:
        assert not await token_log.finish("stranger", publication(claim, 1, ending()))
        assert not await token_log.finish("worker", publication(claim, 2, ending()))
        assert not await token_log.finish("worker", Publication("a", claim.epoch + 1, 1, [ending()]))
        assert await token_log.read("a") == []

    async def test_the_idempotency_key_lives_as_long_as_the_log(
        self, queue: Queue, token_log: TokenLog, redis: Redis, keys: Keys, settings: Settings
    ) -> None:
        await queue.submit(submission("a"), mailbox="api", terms=Terms(idempotency_key="key"))
        await token_log.finish("worker", publication(await claim_one(queue), 1, ending()))
        assert 0 < await redis.ttl(keys.idempotency("default", "key")) <= settings.retention_seconds


async def test_follow_tells_how_far_the_log_reaches(token_log: TokenLog, claim: Claim) -> None:
    assert await token_log.follow("a", "second") == Tail(last=0, finished=False)
    await token_log.publish("worker", [publication(claim, 1, token(1))])
    assert await token_log.follow("a", "second") == Tail(last=1, finished=False)
    await token_log.finish("worker", publication(claim, 2, ending()))
    assert await token_log.follow("a", "third") == Tail(last=2, finished=True)


async def test_an_unknown_request_is_not_found(token_log: TokenLog) -> None:
    with pytest.raises(NotFoundError):
        await token_log.read("nobody")
    with pytest.raises(NotFoundError):
        await token_log.follow("nobody", "api")
