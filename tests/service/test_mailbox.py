"""One reader serves all clients of a process; whatever it misses, the log has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from tests.service.conftest import ExpireLeases, WaitUntil
from tests.service.relay import claim_one, ending, publication, submission, submit, token
from tokenrelay.service.errors import NotFoundError
from tokenrelay.service.keys import Keys
from tokenrelay.service.mailbox import BUFFER_EVENTS, Mailbox, Subscription
from tokenrelay.service.messages import Event
from tokenrelay.service.queue import Claim, Queue
from tokenrelay.service.settings import Settings
from tokenrelay.service.token_log import TokenLog

LONG = 3 * BUFFER_EVENTS


@pytest.fixture
async def opened(mailbox: Mailbox, redis: Redis, keys: Keys, wait_until: WaitUntil) -> Mailbox:
    async def exists() -> bool:
        return bool(await redis.exists(keys.mailbox("api")))

    await wait_until(exists)
    return mailbox


async def rest_of(subscription: AsyncIterator[tuple[int, Event]]) -> list[int]:
    return [index async for index, _ in subscription]


async def write(token_log: TokenLog, claim: Claim, first: int, last: int) -> None:
    for index in range(first, last + 1, 10):
        events = [token(number) for number in range(index, min(index + 10, last + 1))]
        assert await token_log.publish("worker", [publication(claim, index, *events)]) == []


async def emit(token_log: TokenLog, claim: Claim, first: int, last: int) -> None:
    """Tokens from first to the one before last, and the terminal event."""
    await write(token_log, claim, first, last - 1)
    assert await token_log.finish("worker", publication(claim, last, ending()))


async def test_a_client_gets_every_event_and_the_end(opened: Mailbox, queue: Queue, token_log: TokenLog) -> None:
    async with opened.subscribe("a") as subscription:
        await submit(queue, "a")
        await emit(token_log, await claim_one(queue), 1, 5)
        assert await rest_of(subscription) == [1, 2, 3, 4, 5]
        assert await rest_of(subscription) == []


async def test_clients_share_the_mailbox(opened: Mailbox, queue: Queue, token_log: TokenLog) -> None:
    async with opened.subscribe("a") as first, opened.subscribe("b") as second:
        await submit(queue, "a", "b")
        for claim in await queue.claim("worker", 2):
            await emit(token_log, claim, 1, 3)
        assert await rest_of(first) == await rest_of(second) == [1, 2, 3]


async def test_a_client_may_subscribe_before_the_mailbox_is_open(
    url: str, redis: Redis, keys: Keys, queue: Queue, token_log: TokenLog, mailbox: Mailbox
) -> None:
    async with mailbox.subscribe("a") as subscription:
        await submit(queue, "a")
        await emit(token_log, await claim_one(queue), 1, 3)
        assert await rest_of(subscription) == [1, 2, 3]


async def test_a_slow_client_is_served_from_the_log(opened: Mailbox, queue: Queue, token_log: TokenLog) -> None:
    async with opened.subscribe("a") as slow, opened.subscribe("marker") as marker:
        await submit(queue, "a", "marker")
        a, end = await queue.claim("worker", 2)
        await emit(token_log, a, 1, LONG)
        await emit(token_log, end, 1, 1)
        assert await rest_of(marker) == [1]  # by now the reader has offered all of a's events
        assert len(slow._buffer) == BUFFER_EVENTS
        assert await rest_of(slow) == list(range(1, LONG + 1))


async def test_a_client_whose_request_is_given_up_hears_of_it(
    opened: Mailbox, queue: Queue, expire_leases: ExpireLeases, settings: Settings
) -> None:
    async with opened.subscribe("a") as subscription:
        await submit(queue, "a")
        for _ in range(settings.max_attempts):
            await claim_one(queue)
            await expire_leases()
            await queue.reclaim()
        [(_, event)] = [entry async for entry in subscription]
        assert event.error
        assert not subscription._behind  # it came by mailbox


class TestResume:
    async def test_from_any_index_of_a_finished_request(
        self, opened: Mailbox, queue: Queue, token_log: TokenLog
    ) -> None:
        await submit(queue, "a")
        await emit(token_log, await claim_one(queue), 1, LONG)
        for after in (0, 1, BUFFER_EVENTS, LONG - 1, LONG, LONG + 10):
            async with opened.subscribe("a", after=after) as subscription:
                assert await rest_of(subscription) == list(range(after + 1, LONG + 1))

    async def test_of_a_running_request_of_another_process(
        self, opened: Mailbox, queue: Queue, token_log: TokenLog
    ) -> None:
        await queue.submit(submission("a"), mailbox="another-api")
        claim = await claim_one(queue)
        await write(token_log, claim, 1, 3)
        async with opened.subscribe("a", after=1) as subscription:
            assert await anext(subscription) == (2, token(2))
            await emit(token_log, claim, 4, 6)
            assert await rest_of(subscription) == [3, 4, 5, 6]

    async def test_of_an_unknown_request(self, opened: Mailbox) -> None:
        with pytest.raises(NotFoundError):
            async with opened.subscribe("nobody", after=0):
                pass
        assert opened._subscriptions == {}


class TestLoss:
    """Nothing is lost when the mailbox is."""

    async def finish_and_read(self, subscription: Subscription, token_log: TokenLog, claim: Claim) -> None:
        await emit(token_log, claim, 2, 4)
        assert await rest_of(subscription) == [2, 3, 4]

    @pytest.fixture
    async def claim(self, queue: Queue) -> Claim:
        await submit(queue, "a")
        return await claim_one(queue)

    async def test_of_an_entry_trimmed_before_it_was_read(
        self, opened: Mailbox, token_log: TokenLog, claim: Claim, redis: Redis, keys: Keys
    ) -> None:
        async with opened.subscribe("a", after=0) as subscription:
            await write(token_log, claim, 1, 1)
            assert await anext(subscription) == (1, token(1))
            async with redis.pipeline(transaction=True) as pipeline:
                pipeline.xadd(keys.mailbox("api"), {"d": b"\x90"}, id="0-100")
                await pipeline.execute()
            await self.finish_and_read(subscription, token_log, claim)

    async def test_of_the_connection(
        self, opened: Mailbox, token_log: TokenLog, claim: Claim, redis: Redis, keys: Keys
    ) -> None:
        async with opened.subscribe("a", after=0) as subscription:
            await write(token_log, claim, 1, 1)
            assert await anext(subscription) == (1, token(1))
            await redis.client_kill_filter(_type="normal", skipme=True)
            await self.finish_and_read(subscription, token_log, claim)

    async def test_of_the_whole_mailbox(
        self, opened: Mailbox, token_log: TokenLog, claim: Claim, redis: Redis, keys: Keys, wait_until: WaitUntil
    ) -> None:
        async with opened.subscribe("a", after=0) as subscription:
            await write(token_log, claim, 1, 1)
            assert await anext(subscription) == (1, token(1))
            await redis.delete(keys.mailbox("api"))
            opened._renew_at = 0
            await self.finish_and_read(subscription, token_log, claim)
            assert await redis.ttl(keys.mailbox("api")) > 0

    async def test_of_an_entry_it_cannot_read(
        self, opened: Mailbox, token_log: TokenLog, claim: Claim, redis: Redis, keys: Keys
    ) -> None:
        async with opened.subscribe("a", after=0) as subscription:
            await write(token_log, claim, 1, 1)
            assert await anext(subscription) == (1, token(1))
            await redis.xadd(keys.mailbox("api"), {"d": b"\xc1"}, id="0-*")
            await self.finish_and_read(subscription, token_log, claim)

    async def test_of_the_request_itself(self, opened: Mailbox, claim: Claim, redis: Redis) -> None:
        async with opened.subscribe("a", after=0) as subscription:
            await redis.flushall()
            opened._catch_up()
            with pytest.raises(NotFoundError):
                await anext(subscription)


async def test_a_cancelled_wait_loses_nothing(opened: Mailbox, queue: Queue, token_log: TokenLog) -> None:
    """The API waits with a timeout, to send comments on a silent stream."""
    await submit(queue, "a")
    claim = await claim_one(queue)
    async with opened.subscribe("a", after=0) as subscription:
        seen: list[int] = []
        writing = asyncio.create_task(emit(token_log, claim, 1, 50))
        while len(seen) < 50:
            try:
                async with asyncio.timeout(0.0005):
                    seen.append((await anext(subscription))[0])
            except TimeoutError:
                continue
        await writing
    assert seen == list(range(1, 51))


async def test_leaving_forgets_the_subscription(opened: Mailbox) -> None:
    async with opened.subscribe("a"), opened.subscribe("a"):
        assert len(opened._subscriptions["a"]) == 2
    assert opened._subscriptions == {}
