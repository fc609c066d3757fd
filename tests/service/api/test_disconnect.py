"""A client that closes its connection frees the worker, wherever its request is; unless somebody wants the answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest

from tests.service.api.conftest import accepted, ended, in_flight
from tests.service.api.serving import Server, wait_for, working
from tokenrelay.service.broker import connect

LIMIT = 0.2  # seconds from the close to the cancellation
ATTEMPTS = 6  # one of them in time: the limit is this code's, others may have the processor meanwhile


@asynccontextmanager
async def connection(
    server: Server, headers: Mapping[str, str] | None = None, **fields: Any
) -> AsyncIterator[asyncio.StreamReader]:
    """A request over a bare connection, which the end of the block closes."""
    body = json.dumps({"model": server.model, "prompt": "Once", "max_tokens": 2000, **fields}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=2**24)
    head = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
    head += [f"Content-Length: {len(body)}", *(f"{name}: {value}" for name, value in (headers or {}).items())]
    writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + body)
    yield reader
    writer.close()
    await writer.wait_closed()


async def until(condition: Any) -> None:
    await asyncio.to_thread(wait_for, condition)


@pytest.mark.parametrize("fields", [{"stream": True}, {"stream": False}, {"stream": True, "prompt": ["a", "b"]}])
async def test_a_running_request_is_cancelled_at_once(server: Server, fields: dict[str, Any]) -> None:
    taken = [await seconds_until_cancelled_at_work(server, fields)]
    while taken[-1] >= LIMIT:
        assert len(taken) < ATTEMPTS, taken
        taken.append(await seconds_until_cancelled_at_work(server, fields))


async def seconds_until_cancelled_at_work(server: Server, fields: dict[str, Any]) -> float:
    before, count = ended(server, "cancelled"), len(fields.get("prompt", "1"))
    async with working(server, length=10**6, pace=0.01) as worker:
        async with connection(server, **fields):
            await until(lambda: len(worker.claims) == count)
            closed_at = time.monotonic()
        await until(lambda: len(worker.cancelled) == count)
        await until(lambda: ended(server, "cancelled") == before + count)
    return max(worker.cancelled.values()) - closed_at


@pytest.mark.parametrize("stream", [False, True])
async def test_a_waiting_request_leaves_the_queue_at_once(server: Server, stream: bool) -> None:
    taken = [await seconds_until_cancelled_in_the_queue(server, stream)]
    while taken[-1] >= LIMIT:
        assert len(taken) < ATTEMPTS, taken
        taken.append(await seconds_until_cancelled_in_the_queue(server, stream))
    async with connect(server.settings.redis_url) as redis:
        assert await redis.zcard(server.keys.waiting) == 0


async def seconds_until_cancelled_in_the_queue(server: Server, stream: bool) -> float:
    before, cancelled = accepted(server), ended(server, "cancelled")
    async with connection(server, stream=stream):
        await until(lambda: accepted(server) == before + 1)
        closed_at = time.monotonic()
    await until(lambda: ended(server, "cancelled") == cancelled + 1)
    return time.monotonic() - closed_at


async def test_a_client_that_left_in_mid_stream_is_cancelled_and_others_are_not(server: Server) -> None:
    before = ended(server, "cancelled")
    async with (
        working(server, length=10**6, pace=0.005) as worker,
        connection(server, stream=True, max_tokens=100) as staying,
    ):
        async with connection(server, stream=True) as leaving:
            await leaving.readuntil(b'w3"')
        await until(lambda: ended(server, "cancelled") == before + 1)
        assert b'"finish_reason":"length"' in await staying.readuntil(b"[DONE]")
        assert len(worker.cancelled) == 1


async def test_a_client_that_left_is_followed_to_the_end_of_its_request(server: Server) -> None:
    """A worker that notices late: until it does, the request counts as in flight."""
    before = in_flight(server)
    async with working(server, held_back=True) as worker:
        async with connection(server, stream=True):
            await until(lambda: len(worker.claims) == 1)
        await until(lambda: len(worker.cancelled) == 1)
        assert in_flight(server) == before + 1
        worker.gate.set()
        await until(lambda: in_flight(server) == before)


async def test_a_request_that_continues_is_ended_and_can_be_read(server: Server, http: httpx.AsyncClient) -> None:
    """Its outcome is told by the process that accepted it, though nobody is connected."""
    before = ended(server, "stop")
    async with working(server, length=50) as worker:
        async with connection(server, stream=True, on_disconnect="continue") as leaving:
            await leaving.readuntil(b'w3"')
        await until(lambda: ended(server, "stop") == before + 1)
    assert worker.cancelled == {}
    stream = (await http.get(f"/v1/requests/{worker.claims[0].submission.request_id}/stream")).text
    assert [line for line in stream.splitlines() if "w49" in line]
    assert '"finish_reason":"stop"' in stream


async def test_a_client_may_submit_and_go(server: Server, http: httpx.AsyncClient) -> None:
    """In the background: no stream, nobody waits, the answer is there later."""
    before, queued = ended(server, "stop"), accepted(server)
    async with connection(server, on_disconnect="continue"):
        await until(lambda: accepted(server) == queued + 1)
    async with working(server) as worker:
        await until(lambda: ended(server, "stop") == before + 1)
    status = await http.get(f"/v1/requests/{worker.claims[0].submission.request_id}")
    assert status.json()["choices"] == [{"index": 0, "completion_tokens": 8, "finish_reason": "stop"}]


async def test_a_request_is_cancelled_when_its_last_reader_leaves(server: Server) -> None:
    async with working(server, length=10**6, pace=0.01) as worker, AsyncExitStack() as readers:
        async with connection(server, stream=True) as first:
            await first.readuntil(b'w3"')
            relay_id = worker.claims[0].submission.request_id
            second = await readers.enter_async_context(reading(server, relay_id))
            await second.readuntil(b'w3"')
        await second.readuntil(b'w50"')
        assert worker.cancelled == {}
        await readers.aclose()
        await until(lambda: relay_id in worker.cancelled)
        await until(lambda: in_flight(server) == 0)  # before the worker stops


async def test_a_reader_that_leaves_does_not_end_it_for_the_others(server: Server) -> None:
    async with working(server, length=60, pace=0.005) as worker:
        async with connection(server, stream=True) as first:
            await first.readuntil(b'w3"')
            async with reading(server, worker.claims[0].submission.request_id) as second:
                await second.readuntil(b'w3"')
            assert b'"finish_reason":"stop"' in await first.readuntil(b"[DONE]")
        assert worker.cancelled == {}


@asynccontextmanager
async def reading(server: Server, request_id: str) -> AsyncIterator[asyncio.StreamReader]:
    """Another client of the same request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=2**24)
    writer.write(f"GET /v1/requests/{request_id}/stream HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    yield reader
    writer.close()
    await writer.wait_closed()
