"""An API process is killed in the middle of its streams: each goes on at another, and its text is whole."""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx_sse import ServerSentEvent, aconnect_sse, connect_sse

from tests.service.api.serving import Endpoint, api_process, words, working
from tests.service.running import MODEL, RunningService, wait_until
from tokenrelay.service.embedded_valkey import EmbeddedValkey
from tokenrelay.service.settings import Settings

NUM_STREAMS = 8
NUM_TOKENS = 40
PACE = 0.05  # seconds per token: the worker, the clients and the test share one core
KILLED_AFTER = 5  # chunks
RESUMED_WITHIN = 0.1  # seconds from the new request to its first chunk

Body = dict[str, Any]


class Client:
    """Reads one request's stream over any number of connections, as a browser would: by the last id it saw."""

    def __init__(self) -> None:
        self.request_id = ""
        self.last_id = "0"
        self.texts: dict[int, str] = defaultdict(str)
        self.reasons: dict[int, str] = {}
        self.num_chunks = 0
        self.done = False

    def take(self, event: ServerSentEvent) -> None:
        self.done = event.data == "[DONE]"
        if self.done:
            return
        chunk = json.loads(event.data)
        self.request_id, self.last_id = chunk["id"], event.id
        self.num_chunks += 1
        for choice in chunk["choices"]:
            self.texts[choice["index"]] += choice["text"]
            if choice["finish_reason"]:
                assert choice["index"] not in self.reasons
                self.reasons[choice["index"]] = choice["finish_reason"]

    @property
    def resumption(self) -> tuple[str, dict[str, str]]:
        return f"/v1/requests/{self.request_id}/stream", {"Last-Event-ID": self.last_id}


# --- two processes, and a paced worker --------------------------------------------------------------------------------


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    server = EmbeddedValkey(tmp_path, memory_mb=64)
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def endpoints(valkey: EmbeddedValkey, smollm2_path: Path) -> AsyncIterator[list[tuple[Any, Endpoint]]]:
    """Two API processes at one broker."""
    settings = Settings(redis_url=valkey.url, model=str(smollm2_path), served_model_name=MODEL, max_model_len=2048)
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(api_process(settings, MODEL)) for _ in range(2)]


async def test_a_stream_goes_on_at_another_process(endpoints: list[tuple[Any, Endpoint]]) -> None:
    """Whatever the client's leaving would mean: a process that died did not say that its client left."""
    (victim, first), (_, second) = endpoints
    clients = [Client() for _ in range(NUM_STREAMS)]
    gates = [asyncio.Event() for _ in clients]
    async with (
        working(first, length=NUM_TOKENS, pace=PACE),
        httpx.AsyncClient(base_url=second.base_url, timeout=20) as http,
    ):
        await http.post("/v1/completions", json={"model": MODEL, "prompt": "One", "max_tokens": 1})  # warms up
        begun = [asyncio.create_task(begin(first, *pair)) for pair in zip(clients, gates, strict=True)]
        await asyncio.gather(*(gate.wait() for gate in gates))
        victim.kill()
        await asyncio.gather(*begun)
        assert not any(client.done for client in clients)
        delays = await asyncio.gather(*(go_on(http, client) for client in clients))
    assert [client.texts for client in clients] == [{0: words(NUM_TOKENS)}] * NUM_STREAMS
    assert [client.reasons for client in clients] == [{0: "length"}] * NUM_STREAMS
    assert min(delays) < RESUMED_WITHIN, sorted(delays)


async def begin(endpoint: Endpoint, client: Client, far_enough: asyncio.Event) -> None:
    """Read until the connection breaks."""
    body = {"model": endpoint.model, "prompt": "Once", "stream": True, "max_tokens": NUM_TOKENS}
    with suppress(httpx.TransportError):
        async with (
            httpx.AsyncClient(base_url=endpoint.base_url, timeout=20) as http,
            aconnect_sse(http, "POST", "/v1/completions", json=body) as source,
        ):
            async for event in source.aiter_sse():
                client.take(event)
                if client.num_chunks == KILLED_AFTER:
                    far_enough.set()


async def go_on(http: httpx.AsyncClient, client: Client) -> float:
    """Read the rest. Returns the seconds until its first chunk."""
    url, headers = client.resumption
    delay, asked_at = 0.0, time.monotonic()
    async with aconnect_sse(http, "GET", url, headers=headers) as source:
        async for event in source.aiter_sse():
            delay = delay or time.monotonic() - asked_at
            client.take(event)
    assert client.done
    return delay


# --- the whole service, with the real model ---------------------------------------------------------------------------

REQUESTS: list[Body] = [
    {"prompt": "The history of bread begins", "temperature": 0},
    {"prompt": "In the deep forest there lived", "temperature": 1, "seed": 7},
    {"prompt": "def fibonacci(n):", "temperature": 1, "seed": 8, "n": 2},
    {"prompt": "One, two, three, four,", "temperature": 0, "stop": [" nine", "zehn"], "ignore_eos": False},
    {"prompt": ["Dear Sir or Madam,", "Once upon a time"], "temperature": 1, "seed": 9},
]


@pytest.fixture
def service(tmp_path: Path, smollm2_path: Path) -> Iterator[RunningService]:
    with RunningService(tmp_path, lease_seconds=1.5, drain_seconds=20) as running:
        yield running


def test_texts_are_those_of_the_undisturbed_run(service: RunningService) -> None:
    """Greedy, seeded, several choices, a stop string, several prompts. The supervisor starts the next process."""
    with ThreadPoolExecutor(len(REQUESTS)) as pool, httpx.Client(base_url=service.url, timeout=60) as http:
        undisturbed = list(pool.map(lambda body: read_all(http, body, Client()), REQUESTS))
        clients = [Client() for _ in REQUESTS]
        reading = [pool.submit(read_all, http, *pair) for pair in zip(REQUESTS, clients, strict=True)]
        wait_until(lambda: all(client.num_chunks > KILLED_AFTER for client in clients), "all streams begun")
        service.kill("api")
        assert not any(task.result().done for task in reading)
        wait_until(service.is_ready, "the next API process")
        list(pool.map(lambda client: read_rest(http, client), clients))
    assert all(client.done for client in clients)
    assert [client.texts for client in clients] == [client.texts for client in undisturbed]
    assert [client.reasons for client in clients] == [client.reasons for client in undisturbed]


def read_all(http: httpx.Client, body: Body, client: Client) -> Client:
    """Until the end, or until the connection breaks."""
    body = {"model": MODEL, "max_tokens": 48, "ignore_eos": True, "stream": True, **body}
    with suppress(httpx.TransportError), connect_sse(http, "POST", "/v1/completions", json=body) as source:
        for event in source.iter_sse():
            client.take(event)
    return client


def read_rest(http: httpx.Client, client: Client) -> None:
    url, headers = client.resumption
    with connect_sse(http, "GET", url, headers=headers) as source:
        for event in source.iter_sse():
            client.take(event)
