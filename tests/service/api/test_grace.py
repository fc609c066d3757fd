"""With a grace time, a client whose connection broke may come back before its request is given up."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from tests.service.api.conftest import ended
from tests.service.api.serving import Server, wait_for, working
from tests.service.api.test_disconnect import connection, reading, until
from tokenrelay.service.embedded_valkey import EmbeddedValkey
from tokenrelay.service.settings import Settings

GRACE = 2.0  # seconds in which a busy machine, too, comes back


@pytest.fixture(scope="module")
def api_settings(valkey: EmbeddedValkey) -> Settings:
    return Settings(redis_url=valkey.url, disconnect_grace_seconds=GRACE, drain_seconds=0.5)


async def test_who_does_not_come_back_in_time_is_cancelled(server: Server) -> None:
    before = ended(server, "cancelled")
    async with working(server, length=10**6, pace=0.01) as worker:
        async with connection(server, stream=True) as leaving:
            await leaving.readuntil(b'w3"')
            left_at = time.monotonic()
        await until(lambda: ended(server, "cancelled") == before + 1)
    [cancelled_at] = worker.cancelled.values()
    assert GRACE < cancelled_at - left_at < 5 * GRACE


async def test_who_comes_back_in_time_reads_on(server: Server) -> None:
    async with working(server, length=220, pace=0.01) as worker:
        async with connection(server, stream=True) as leaving:
            await leaving.readuntil(b'w3"')
        left_at = time.monotonic()
        async with reading(server, worker.claims[0].submission.request_id) as back:
            assert b'"finish_reason":"stop"' in await back.readuntil(b"[DONE]")
        assert time.monotonic() > left_at + GRACE
        assert worker.cancelled == {}


async def test_what_ends_meanwhile_has_its_own_outcome(server: Server, http: httpx.AsyncClient) -> None:
    before = ended(server, "stop")
    async with working(server, length=20) as worker:
        async with connection(server, stream=True) as leaving:
            await leaving.readuntil(b'w3"')
        await asyncio.to_thread(wait_for, lambda: ended(server, "stop") == before + 1)
        assert worker.cancelled == {}
