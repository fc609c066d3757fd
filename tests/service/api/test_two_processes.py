"""Two API processes at one broker: any of them serves any request."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack

import httpx

from tests.service.api.conftest import ended, in_flight
from tests.service.api.serving import Server, serving, words, working
from tests.service.api.test_disconnect import connection, reading, until
from tests.service.api.test_resume import CHAT, chunks_of, resumed, streamed, texts
from tokenrelay.service.api.process import FAREWELL_SECONDS
from tokenrelay.service.api.served_model import ServedModel
from tokenrelay.service.settings import Settings


async def test_a_stream_goes_on_at_the_other(server: Server, http: httpx.AsyncClient, other: httpx.AsyncClient) -> None:
    async with working(server):
        answer_id, whole = await streamed(http, server, CHAT)
    for i, chunk in enumerate(whole[:-1], 1):
        assert await resumed(other, answer_id, chunk.id) == whole[i:]


async def test_a_request_read_at_the_other_is_not_cancelled(server: Server, other_server: Server) -> None:
    """Not by its first client's leaving; but when the last reader is gone, wherever that one was."""
    before = ended(server, "cancelled")
    async with working(server, length=10**6, pace=0.01) as worker:
        async with connection(server, stream=True) as first:
            await first.readuntil(b'w3"')
            relay_id = worker.claims[0].submission.request_id
            second = reading(other_server, relay_id)
            elsewhere = await second.__aenter__()
            await elsewhere.readuntil(b'w3"')
        await elsewhere.readuntil(b'w100"')
        assert worker.cancelled == {}
        await second.__aexit__(None, None, None)
        await until(lambda: relay_id in worker.cancelled)
        await until(lambda: ended(server, "cancelled") == before + 1)


async def test_a_request_is_cancelled_and_asked_about_at_the_other(server: Server, other: httpx.AsyncClient) -> None:
    async with working(server, length=10**6, pace=0.01) as worker:
        async with connection(server, stream=True) as reader:
            await reader.readuntil(b'w3"')
            relay_id = worker.claims[0].submission.request_id
            assert (await other.get(f"/v1/requests/{relay_id}")).json()["state"] == "running"
            assert (await other.delete(f"/v1/requests/{relay_id}")).json()["was"] == "running"
            assert b'"code":"cancelled"' in await reader.readuntil(b"[DONE]")
        assert (await other.get(f"/v1/requests/{relay_id}")).json()["outcome"] == "cancelled"


async def test_a_key_stands_for_the_same_request_at_both(
    server: Server, http: httpx.AsyncClient, other: httpx.AsyncClient
) -> None:
    async with working(server) as worker:
        body = {"model": server.model, "stream": True, **CHAT}
        answers = [
            await client.post("/v1/chat/completions", json=body, headers={"Idempotency-Key": "once"})
            for client in (http, other)
        ]
    assert len(worker.claims) == 1
    first, second = map(chunks_of, answers)
    assert first == second
    assert texts(second) == {0: words(8)}


async def test_what_continues_does_not_hold_up_a_process_that_stops(
    server: Server, api_settings: Settings, served_model: ServedModel, http: httpx.AsyncClient
) -> None:
    with ExitStack() as stopping:
        first = stopping.enter_context(serving(api_settings, served_model))
        async with working(first, length=100, pace=0.01) as worker:
            async with connection(first, stream=True, on_disconnect="continue", max_tokens=100) as leaving:
                await leaving.readuntil(b'w3"')
            stops_at = time.monotonic()
            await asyncio.to_thread(stopping.close)
            assert time.monotonic() - stops_at < FAREWELL_SECONDS
            assert in_flight(first) == 0
            assert texts(await resumed(http, worker.claims[0].submission.request_id, "0")) == {0: words(100)}
