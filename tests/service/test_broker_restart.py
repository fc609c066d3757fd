"""The broker is killed in the middle of a stream, and started again: worker and client go on as if nothing was."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.service.relay import claim_one, ending, publication, submission, submit, token
from tokenrelay.service.broker import connect
from tokenrelay.service.embedded_valkey import EmbeddedValkey
from tokenrelay.service.errors import BrokerUnavailable
from tokenrelay.service.keys import Keys
from tokenrelay.service.mailbox import Mailbox
from tokenrelay.service.queue import Claim, Queue
from tokenrelay.service.settings import Settings
from tokenrelay.service.token_log import TokenLog

TOKENS = 60
KILLED_AT = (20, 40)


class Mortal:
    """A broker of its own, with a client of every kind."""

    def __init__(self, server: EmbeddedValkey, redis: Redis, blocking: Redis, settings: Settings) -> None:
        keys = Keys("mortal")
        self.server = server
        self.queue = Queue(redis, keys, settings)
        self.log = TokenLog(redis, keys, settings)
        self.mailbox = Mailbox(blocking, redis, keys, self.log, "api")

    def kill(self) -> None:
        assert self.server.pid
        os.kill(self.server.pid, signal.SIGKILL)
        self.server.wait(60)

    async def publish(self, claim: Claim, index: int) -> None:
        """As a worker does: until the broker has it."""
        while True:
            with suppress(BrokerUnavailable):
                assert await self.log.publish("worker", [publication(claim, index, token(index))]) == []
                return
            if self.server.pid is None:
                self.server.start()


@pytest.fixture
async def mortal(tmp_path: Path, settings: Settings) -> AsyncIterator[Mortal]:
    server = EmbeddedValkey(tmp_path, memory_mb=32)
    url = server.start()
    async with AsyncExitStack() as stack:
        stack.callback(server.stop)
        redis = await stack.enter_async_context(connect(url))
        blocking = await stack.enter_async_context(connect(url, blocking=True))
        mortal = Mortal(server, redis, blocking, settings)
        running = asyncio.create_task(mortal.mailbox.run())
        yield mortal
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


async def test_a_stream_survives_its_broker(mortal: Mortal) -> None:
    async with mortal.mailbox.subscribe("a") as subscription:
        await submit(mortal.queue, "a")
        claim = await claim_one(mortal.queue)
        for index in range(1, TOKENS):
            if index in KILLED_AT:
                mortal.kill()
            await mortal.publish(claim, index)
        assert await mortal.log.finish("worker", publication(claim, TOKENS, ending(TOKENS - 1)))
        async with asyncio.timeout(60):
            seen = [entry async for entry in subscription]
    assert seen == [*((i, token(i)) for i in range(1, TOKENS)), (TOKENS, ending(TOKENS - 1))]


async def test_a_client_waits_for_it_while_a_new_request_is_refused(mortal: Mortal) -> None:
    async with mortal.mailbox.subscribe("a") as subscription:
        await submit(mortal.queue, "a")
        claim = await claim_one(mortal.queue)
        await mortal.publish(claim, 1)
        assert await anext(subscription) == (1, token(1))
        waiting = asyncio.create_task(subscription.__anext__())
        mortal.kill()
        with pytest.raises(BrokerUnavailable):
            await mortal.queue.submit(submission("b"), mailbox="api")
        assert not waiting.done()
        await mortal.publish(claim, 2)
        async with asyncio.timeout(60):
            assert await waiting == (2, token(2))
