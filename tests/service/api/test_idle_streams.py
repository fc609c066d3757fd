"""Streams that wait cost little: no connection to the broker, and a few kilobytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil
import pytest
import redis as sync_redis
from redis.asyncio import Redis

from tests.service.api.serving import Endpoint, Server, api_process, wait_for
from tokenrelay.service.broker import MAX_CONNECTIONS
from tokenrelay.service.embedded_valkey import EmbeddedValkey
from tokenrelay.service.settings import Settings

MAX_BROKER_CONNECTIONS = 4  # those of commands, and that of the mailbox
MAX_RESIDENT = 40 << 10  # bytes per stream


@asynccontextmanager
async def idle_streams(endpoint: Endpoint, count: int) -> AsyncIterator[list[bytes]]:
    """Begun all at once, and waiting for a worker. Yields how their answers begin."""
    message = {"role": "user", "content": "Once upon a time there was"}
    body = json.dumps({"model": endpoint.model, "messages": [message], "stream": True}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    opened = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", endpoint.port) for _ in range(count)))
    for _, writer in opened:
        writer.write(f"{head}{len(body)}\r\n\r\n".encode() + body)
    yield await asyncio.gather(*(beginning_of_answer(reader) for reader, _ in opened))
    for _, writer in opened:
        writer.close()
    await asyncio.gather(*(writer.wait_closed() for _, writer in opened))


async def beginning_of_answer(reader: asyncio.StreamReader) -> bytes:
    """The status line; of an error, everything."""
    head = await reader.readuntil(b"\r\n\r\n")
    status = head.partition(b"\r\n")[0]
    return status if status.endswith(b"200 OK") else head + await reader.read(1000)


async def test_a_burst_of_streams_shares_few_connections(server: Server, redis: Redis) -> None:
    """As many as would be refused for a connection of their own; and none is."""
    before = len(await redis.client_list())
    async with idle_streams(server, 200) as statuses:
        assert set(statuses) == {b"HTTP/1.1 200 OK"}
        assert len(await redis.client_list()) - before < MAX_BROKER_CONNECTIONS
    await asyncio.to_thread(wait_for, lambda: not server.connections)


def test_an_api_process_has_four_connections_at_most() -> None:
    blocking = 1  # the mailbox's only reader
    assert MAX_CONNECTIONS + blocking == MAX_BROKER_CONNECTIONS


@pytest.mark.long
async def test_five_hundred_idle_streams(valkey: EmbeddedValkey) -> None:
    settings = Settings(redis_url=valkey.url, served_model_name="idle", max_model_len=2048, max_waiting=2000)
    async with api_process(settings, "idle") as (process, endpoint):
        api = psutil.Process(process.pid)
        with sync_redis.Redis.from_url(valkey.url) as broker:
            async with idle_streams(endpoint, 20):
                resident, others = api.memory_info().rss, len(broker.client_list()) - MAX_BROKER_CONNECTIONS
                async with idle_streams(endpoint, 500) as statuses:
                    per_stream = (api.memory_info().rss - resident) / 500
                    connections = len(broker.client_list()) - others
        print(f"{per_stream / 1024:.1f} KB per idle stream, {connections} connections to the broker")
        assert set(statuses) == {b"HTTP/1.1 200 OK"}
        assert connections <= MAX_BROKER_CONNECTIONS
        assert per_stream <= MAX_RESIDENT
