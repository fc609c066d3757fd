"""Requests wait, are worked on, are handed on, and end exactly once."""

from __future__ import annotations

from typing import Any

import pytest
from redis.asyncio import Redis

from tests.service.conftest import ExpireLeases, WaitUntil
from tests.service.relay import claim_ids, claim_one, ending, publication, submission, submit, token
from tokenrelay.service.errors import BrokerUnavailable, QueueFull
from tokenrelay.service.keys import Keys
from tokenrelay.service.messages import Event, Usage
from tokenrelay.service.queue import RECLAIM_BATCH, CancelOutcome, Queue, Renewal
from tokenrelay.service.settings import Settings
from tokenrelay.service.terms import Terms
from tokenrelay.service.token_log import TokenLog


async def dead_letters(redis: Redis, keys: Keys) -> list[dict[bytes, bytes]]:
    entries: Any = await redis.xrange(keys.dead)
    return [letter for _, letter in entries]


class TestSubmit:
    async def test_a_request_waits_at_its_position(self, queue: Queue) -> None:
        first = await queue.submit(submission("first"), mailbox="api")
        second = await queue.submit(submission("second"), mailbox="api")
        assert (first.position, first.created, second.position) == (0, True, 1)
        assert await queue.num_waiting() == 2
        assert await queue.position("second") == 1
        assert await queue.position("nobody") is None

    async def test_the_same_id_is_accepted_once(self, queue: Queue) -> None:
        await submit(queue, "other", "same")
        again = await queue.submit(submission("same", max_tokens=99), mailbox="api")
        assert (again.created, again.position) == (False, 1)
        assert await queue.num_waiting() == 2

    async def test_an_idempotency_key_finds_the_earlier_request_of_its_tenant(self, queue: Queue) -> None:
        async def send(request_id: str, tenant: str) -> tuple[str, bool]:
            request = submission(request_id, tenant=tenant)
            _, created, found, _ = await queue.submit(request, mailbox="api", terms=Terms(idempotency_key="key"))
            return found, created

        assert await send("first", "alice") == ("first", True)
        assert await send("second", "alice") == ("first", False)
        assert await send("third", "bob") == ("third", True)

    async def test_an_idempotency_key_is_forgotten_with_its_request(
        self, queue: Queue, redis: Redis, keys: Keys
    ) -> None:
        await queue.submit(submission("first"), mailbox="api", terms=Terms(idempotency_key="key"))
        await redis.delete(keys.request("first"))
        again = await queue.submit(submission("second"), mailbox="api", terms=Terms(idempotency_key="key"))
        assert (again.request_id, again.created) == ("second", True)

    async def test_a_full_queue_refuses_new_requests_but_knows_the_old(self, redis: Redis, keys: Keys) -> None:
        queue = Queue(redis, keys, Settings(max_waiting=1))
        await submit(queue, "first")
        with pytest.raises(QueueFull) as refusal:
            await submit(queue, "second")
        assert refusal.value.retry_after
        assert not (await queue.submit(submission("first", n=2), mailbox="api")).created


class TestClaim:
    async def test_it_takes_no_more_than_it_has_room_for(self, queue: Queue) -> None:
        await submit(queue, "a", "b", "c")
        assert await claim_ids(queue, 2) == ["a", "b"]
        assert await claim_ids(queue, 2) == ["c"]
        assert await claim_ids(queue, 2) == []

    async def test_a_fresh_claim(self, queue: Queue) -> None:
        await submit(queue, "a")
        claim = await claim_one(queue)
        assert claim.submission == submission("a")
        assert (claim.epoch, claim.attempts, claim.log) == (1, 1, [])
        assert claim.queued_seconds >= 0

    async def test_a_request_whose_hash_vanished_is_passed_over(self, queue: Queue, redis: Redis, keys: Keys) -> None:
        await submit(queue, "gone", "here")
        await redis.delete(keys.request("gone"))
        assert await claim_ids(queue, 1) == ["here"]
        assert await queue.num_waiting() == 0

    async def test_an_unreadable_request_ends_with_an_error(
        self, queue: Queue, redis: Redis, keys: Keys, token_log: TokenLog
    ) -> None:
        await submit(queue, "broken", "sound")
        await redis.hset(keys.request("broken"), "payload", b"\xc1")
        assert await claim_ids(queue) == ["sound"]
        [(index, event)] = await token_log.read("broken")
        assert index == 1
        assert event.error
        assert event.error.code == "unreadable_request"
        [letter] = await dead_letters(redis, keys)
        assert (letter[b"id"], letter[b"payload"]) == (b"broken", b"\xc1")
        assert await redis.zrange(keys.leases, 0, -1) == [b"sound"]

    async def test_one_that_broke_off_half_way_is_found_again(
        self, queue: Queue, redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await submit(queue, "broken", "sound")
        await redis.hset(keys.request("broken"), "payload", b"\xc1")
        finish = queue._token_log.finish

        async def finish_unheard(*arguments: Any, **options: Any) -> bool:
            await finish(*arguments, **options)
            raise BrokerUnavailable("cut")

        monkeypatch.setattr(queue._token_log, "finish", finish_unheard)
        with pytest.raises(BrokerUnavailable):
            await queue.claim("worker", 2)
        assert [(c.submission.request_id, c.attempts) for c in await queue.claim("worker", 2)] == [("sound", 1)]


class TestRenew:
    async def test_it_tells_what_was_lost_and_what_was_cancelled(self, queue: Queue, redis: Redis, keys: Keys) -> None:
        await submit(queue, "held", "cancelled", "regiven")
        held = {claim.submission.request_id: claim.epoch for claim in await queue.claim("worker", 3)}
        await queue.cancel("cancelled")
        await redis.hset(keys.request("regiven"), "epoch", 2)
        assert await queue.renew("worker", {**held, "vanished": 1}) == Renewal(["regiven", "vanished"], ["cancelled"])

    async def test_a_renewed_lease_is_not_reclaimed(self, queue: Queue, expire_leases: ExpireLeases) -> None:
        await submit(queue, "a")
        await queue.claim("worker", 1)
        await expire_leases()
        await queue.renew("worker", {"a": 1})
        assert await queue.reclaim() == []

    async def test_a_finished_request_is_neither_lost_nor_leased(
        self, queue: Queue, token_log: TokenLog, redis: Redis, keys: Keys
    ) -> None:
        await submit(queue, "a")
        await token_log.finish("worker", publication(await claim_one(queue), 1, ending()))
        assert await queue.renew("worker", {"a": 1}) == Renewal([], [])
        assert await redis.zcard(keys.leases) == 0

    async def test_leases_expire_by_the_brokers_clock(self, redis: Redis, keys: Keys, wait_until: WaitUntil) -> None:
        queue = Queue(redis, keys, Settings(lease_seconds=0.02))
        await submit(queue, "a")
        await queue.claim("worker", 1)

        async def reclaimed() -> bool:
            return await queue.reclaim() == ["a"]

        await wait_until(reclaimed)


class TestReclaim:
    async def test_the_next_owner_gets_the_log_and_continues(
        self, queue: Queue, token_log: TokenLog, expire_leases: ExpireLeases
    ) -> None:
        await submit(queue, "a")
        await token_log.publish("first", [publication(await claim_one(queue, "first"), 1, token(1), token(2))])
        await expire_leases()
        assert await queue.reclaim() == ["a"]
        claim = await claim_one(queue, "second")
        assert (claim.epoch, claim.attempts, claim.log) == (2, 2, [token(1), token(2)])
        assert await token_log.publish("second", [publication(claim, 3, token(3))]) == []

    async def test_it_goes_back_to_its_old_place(self, queue: Queue, expire_leases: ExpireLeases) -> None:
        await submit(queue, "a", "b")
        await claim_one(queue)
        await expire_leases()
        await submit(queue, "c")
        await queue.reclaim()
        assert await claim_ids(queue) == ["a", "b", "c"]

    async def test_more_than_one_batch(self, queue: Queue, expire_leases: ExpireLeases) -> None:
        names = [f"request-{i}" for i in range(2 * RECLAIM_BATCH + 1)]
        await submit(queue, *names)
        await queue.claim("worker", len(names))
        await expire_leases()
        assert sorted(await queue.reclaim()) == sorted(names)
        assert await queue.reclaim() == []

    async def test_a_lease_whose_request_vanished_is_dropped(
        self, queue: Queue, redis: Redis, keys: Keys, expire_leases: ExpireLeases
    ) -> None:
        await submit(queue, "gone")
        await claim_one(queue)
        await redis.delete(keys.request("gone"))
        await expire_leases()
        assert await queue.reclaim() == []
        assert await redis.zcard(keys.leases) == 0

    async def test_a_lease_from_before_the_broker_lost_the_request_does_not_count(
        self, queue: Queue, redis: Redis, keys: Keys, expire_leases: ExpireLeases
    ) -> None:
        await submit(queue, "a")
        await claim_one(queue)
        await redis.delete(keys.request("a"))
        await submit(queue, "a")
        await expire_leases()
        assert await queue.reclaim() == []
        assert (await claim_one(queue)).attempts == 1

    async def test_a_request_that_kills_its_workers_becomes_a_dead_letter(
        self,
        queue: Queue,
        redis: Redis,
        keys: Keys,
        token_log: TokenLog,
        expire_leases: ExpireLeases,
        settings: Settings,
    ) -> None:
        await submit(queue, "poison")
        for attempt in range(1, settings.max_attempts + 1):
            claim = await claim_one(queue)
            assert claim.attempts == attempt
            await expire_leases()
            assert await queue.reclaim() == ["poison"]
        assert await claim_ids(queue) == []
        [(_, event)] = await token_log.read("poison")
        assert event.error
        assert (event.error.code, event.error.status) == ("worker_lost", 500)
        [letter] = await dead_letters(redis, keys)
        assert (letter[b"id"], letter[b"attempts"], letter[b"reason"]) == (b"poison", b"3", b"worker_lost")
        assert await token_log.publish("worker", [publication(claim, 1, token(1))]) == ["poison"]


class TestRelease:
    async def test_a_drained_request_waits_again_and_keeps_its_attempts(
        self, queue: Queue, token_log: TokenLog, redis: Redis, keys: Keys
    ) -> None:
        await submit(queue, "a")
        first = await claim_one(queue, "first")
        await token_log.publish("first", [publication(first, 1, token(1))])
        await queue.release("first", "a", first.epoch)
        assert await redis.zcard(keys.leases) == 0
        second = await claim_one(queue, "second")
        assert (second.epoch, second.attempts, second.log) == (2, 1, [token(1)])

    async def test_only_the_owner_may_release(self, queue: Queue) -> None:
        await submit(queue, "a")
        claim = await claim_one(queue)
        await queue.release("stranger", "a", claim.epoch)
        await queue.release("worker", "a", claim.epoch + 1)
        await queue.release("worker", "nothing", 1)
        assert await queue.num_waiting() == 0


class TestCancel:
    async def test_a_waiting_request_ends_at_once(self, queue: Queue, token_log: TokenLog) -> None:
        await submit(queue, "a")
        assert await queue.cancel("a") is CancelOutcome.WAITING
        assert await queue.num_waiting() == 0
        usage = Usage(prompt_tokens=3, completion_tokens=0)
        assert await token_log.read("a") == [(1, Event(finish_reason="cancelled", usage=usage))]
        assert await queue.cancel("a") is CancelOutcome.FINISHED

    async def test_every_choice_of_a_waiting_request_ends(self, queue: Queue, token_log: TokenLog) -> None:
        await submit(queue, "a", n=3)
        await queue.cancel("a")
        events = [event for _, event in await token_log.read("a")]
        assert [(event.choice, event.finish_reason) for event in events] == [(i, "cancelled") for i in range(3)]
        assert [event.terminal for event in events] == [False, False, True]

    async def test_a_reclaimed_request_keeps_what_was_emitted(
        self, queue: Queue, token_log: TokenLog, expire_leases: ExpireLeases
    ) -> None:
        await submit(queue, "a")
        await token_log.publish("worker", [publication(await claim_one(queue), 1, token(1), token(2))])
        await expire_leases()
        await queue.reclaim()
        assert await queue.cancel("a") is CancelOutcome.WAITING
        index, event = (await token_log.read("a"))[-1]
        assert (index, event.usage) == (3, Usage(prompt_tokens=3, completion_tokens=2))

    async def test_a_running_request_is_left_to_its_worker(self, queue: Queue, token_log: TokenLog) -> None:
        await submit(queue, "a")
        await claim_one(queue)
        assert await queue.cancel("a") is CancelOutcome.RUNNING
        assert await queue.cancel("a") is CancelOutcome.RUNNING
        assert await token_log.read("a") == []

    async def test_if_that_worker_dies_the_next_claim_ends_it(
        self, queue: Queue, token_log: TokenLog, expire_leases: ExpireLeases
    ) -> None:
        await submit(queue, "a")
        await claim_one(queue)
        await queue.cancel("a")
        await expire_leases()
        await queue.reclaim()
        assert await claim_ids(queue) == []
        [(_, event)] = await token_log.read("a")
        assert event.finish_reason == "cancelled"
        assert event.terminal

    async def test_an_unknown_request(self, queue: Queue) -> None:
        assert await queue.cancel("nobody") is CancelOutcome.UNKNOWN


async def test_wakeups_tell_of_submissions_and_cancellations(queue: Queue) -> None:
    wakeups = queue.wakeups()
    assert await anext(wakeups) == "submit"  # something may have come before it listened
    await submit(queue, "a")
    assert await anext(wakeups) == "submit"
    await claim_one(queue)
    await queue.cancel("a")
    assert await anext(wakeups) == "cancel a"
    await wakeups.aclose()
