"""The broker may cut a reply, vanish, fill up or answer late: nothing is doubled, and callers hear of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import BusyLoadingError, OutOfMemoryError, ReadOnlyError, ResponseError

from tests.service.conftest import ExpireLeases
from tests.service.relay import claim_ids, claim_one, ending, publication, submission, submit, token
from tokenrelay.service.broker import broker_errors, connect
from tokenrelay.service.errors import BrokerUnavailable
from tokenrelay.service.keys import Keys
from tokenrelay.service.queue import CancelOutcome, Queue
from tokenrelay.service.settings import Settings
from tokenrelay.service.token_log import TokenLog


class Proxy:
    """Between client and broker, on a socket of its own; drops the next ``cuts`` replies and their connections."""

    def __init__(self, broker: Path, path: Path) -> None:
        self.cuts = 0
        self.url = f"unix://{path}"
        self._broker = broker
        self._path = path

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        broker_reader, broker_writer = await asyncio.open_unix_connection(self._broker)
        forward = asyncio.create_task(self._forward(reader, broker_writer))
        with suppress(ConnectionError):
            await self._answer(broker_reader, writer)
        forward.cancel()
        for end in (writer, broker_writer):
            end.close()
            with suppress(ConnectionError):
                await end.wait_closed()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if self.cuts and not data.startswith((b"+OK", b"-NOSCRIPT")):  # not the handshake's
                self.cuts -= 1
                return
            writer.write(data)
            await writer.drain()


@pytest.fixture
async def proxy(url: str, tmp_path: Path) -> AsyncIterator[Proxy]:
    async with Proxy(Path(url.removeprefix("unix://")), tmp_path / "proxy.sock") as proxy:
        yield proxy


@pytest.fixture
async def cut_redis(proxy: Proxy) -> AsyncIterator[Redis]:
    async with connect(proxy.url) as client:
        yield client


@pytest.fixture
def cut_queue(cut_redis: Redis, keys: Keys, settings: Settings) -> Queue:
    return Queue(cut_redis, keys, settings)


@pytest.fixture
def cut_log(cut_redis: Redis, keys: Keys, settings: Settings) -> TokenLog:
    return TokenLog(cut_redis, keys, settings)


class TestCutReply:
    """The broker did it, the client did not hear of it, and sent it again."""

    async def test_submit(self, proxy: Proxy, cut_queue: Queue, queue: Queue) -> None:
        proxy.cuts = 2
        again = await cut_queue.submit(submission("a"), mailbox="api")
        assert (proxy.cuts, again.created, again.request_id) == (0, True, "a")
        assert await queue.num_waiting() == 1

    async def test_claim(self, proxy: Proxy, cut_queue: Queue, queue: Queue) -> None:
        await submit(queue, "a", "b", "c")
        proxy.cuts = 1
        claims = await cut_queue.claim("worker", 2)
        assert [(claim.submission.request_id, claim.attempts) for claim in claims] == [("a", 1), ("b", 1)]
        assert await claim_ids(cut_queue) == ["c"]

    async def test_claim_that_failed_altogether(self, proxy: Proxy, cut_queue: Queue, queue: Queue) -> None:
        await submit(queue, "a", "b")
        proxy.cuts = 3
        with pytest.raises(BrokerUnavailable):
            await cut_queue.claim("worker", 1)
        assert [claim.attempts for claim in await cut_queue.claim("worker", 1)] == [1]
        assert await claim_ids(cut_queue) == ["b"]

    async def test_claim_that_failed_until_its_leases_expired(
        self, proxy: Proxy, cut_queue: Queue, queue: Queue, expire_leases: ExpireLeases
    ) -> None:
        await submit(queue, "a")
        proxy.cuts = 3
        with pytest.raises(BrokerUnavailable):
            await cut_queue.claim("late", 1)
        await expire_leases()
        await queue.reclaim()
        assert await claim_ids(queue, worker_id="prompt") == ["a"]
        assert await cut_queue.claim("late", 1) == []

    async def test_publish_and_finish(self, proxy: Proxy, cut_log: TokenLog, queue: Queue) -> None:
        await submit(queue, "a")
        claim = await claim_one(queue)
        proxy.cuts = 1
        assert await cut_log.publish("worker", [publication(claim, 1, token(1))]) == []
        proxy.cuts = 1
        assert await cut_log.finish("worker", publication(claim, 2, ending(1)))
        assert [index for index, _ in await cut_log.read("a")] == [1, 2]

    async def test_release(self, proxy: Proxy, cut_queue: Queue, queue: Queue) -> None:
        await submit(queue, "a")
        await claim_one(queue)
        proxy.cuts = 1
        await cut_queue.release("worker", "a", 1)
        assert (await claim_one(queue)).attempts == 1

    async def test_cancel(self, proxy: Proxy, cut_queue: Queue, cut_log: TokenLog, queue: Queue) -> None:
        await submit(queue, "a")
        proxy.cuts = 1
        assert await cut_queue.cancel("a") in (CancelOutcome.WAITING, CancelOutcome.FINISHED)
        assert len(await cut_log.read("a")) == 1


class TestUnavailable:
    async def test_nobody_listens(self, tmp_path: Path, keys: Keys, settings: Settings) -> None:
        async with connect(f"unix://{tmp_path}/nothing.sock") as client:
            with pytest.raises(BrokerUnavailable) as error:
                async with asyncio.timeout(2):
                    await Queue(client, keys, settings).num_waiting()
        assert error.value.retry_after

    async def test_full_memory_refuses_new_requests_and_ends_the_old(
        self, queue: Queue, token_log: TokenLog, redis: Redis
    ) -> None:
        await submit(queue, "a", "b")
        before = (await redis.config_get("maxmemory"))["maxmemory"] or 0
        await redis.config_set("maxmemory", 1)
        try:
            with pytest.raises(BrokerUnavailable):
                await submit(queue, "c")
            claim = await claim_one(queue)
            assert await token_log.publish("worker", [publication(claim, 1, token(1))]) == []
            assert await token_log.finish("worker", publication(claim, 2, ending(1)))
            assert await queue.cancel("b") is CancelOutcome.WAITING
        finally:
            await redis.config_set("maxmemory", before)

    @pytest.mark.parametrize(
        "error",
        [OutOfMemoryError("full"), ReadOnlyError("a replica"), BusyLoadingError("wait"), ResponseError("MISCONF disk")],
    )
    async def test_what_will_pass(self, error: Exception) -> None:
        with pytest.raises(BrokerUnavailable):
            async with broker_errors():
                raise error

    async def test_a_mistake_of_ours_is_not_hidden(self, redis: Redis) -> None:
        await redis.set("text", "is no list", ex=60)
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            async with broker_errors():
                await redis.lpush("text", 1)


async def test_many_callers_share_few_connections(queue: Queue) -> None:
    assert await asyncio.gather(*(queue.num_waiting() for _ in range(300))) == [0] * 300


async def test_a_cancellation_is_never_swallowed(url: str) -> None:
    """redis-py sends with asyncio.wait_for, which may lose one before Python 3.12."""

    async def read_for_ever(client: Redis) -> None:
        while True:
            async with broker_errors():
                await client.xread({"nothing": "0"}, block=50)

    for steps in range(0, 60, 2):
        async with connect(url, blocking=True) as client:
            task = asyncio.create_task(read_for_ever(client))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            async with asyncio.timeout(60):
                with suppress(asyncio.CancelledError):
                    await task
