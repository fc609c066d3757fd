"""The broker hangs, fills up, becomes a replica or loses everything under a running stream: nothing hangs with it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from redis.asyncio import Redis

from tests.service.api.serving import Server, serving
from tests.service.worker.working import Hand, working
from tokenrelay.service.api.served_model import ServedModel, load_served_model
from tokenrelay.service.broker import connect
from tokenrelay.service.embedded_valkey import EmbeddedValkey
from tokenrelay.service.keys import Keys
from tokenrelay.service.settings import Settings
from tokenrelay.service.worker.role import Role

NUM_TOKENS = 40
BODY = {"prompt": "Once", "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True}


class Site:
    """A broker of its own, an API and a worker: everything but a network."""

    def __init__(
        self, broker: EmbeddedValkey, redis: Redis, server: Server, hand: Hand, http: httpx.AsyncClient
    ) -> None:
        self.broker, self.redis, self.server, self.hand, self.http = broker, redis, server, hand, http
        self.body = BODY | {"model": server.model}

    @property
    def num_in_flight(self) -> float | None:
        labels = {"model_name": self.server.model}
        return self.server.metrics.get_sample_value("tokenrelay_requests_in_flight", labels)

    def signal(self, signum: signal.Signals) -> None:
        assert self.broker.pid
        os.kill(self.broker.pid, signum)

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[Stream]:
        """One that has begun, and whose next step waits."""
        self.hand.network.gate.set()
        async with self.http.stream("POST", "/v1/completions", json=self.body) as response:
            stream = Stream(response)
            await stream.read_until('"text"')
            self.hand.network.gate.clear()
            yield stream
            self.hand.network.gate.set()

    async def refusal(self) -> tuple[int, float]:
        """The status of a new request, and after how many seconds it came."""
        started = time.perf_counter()
        response = await self.http.post("/v1/completions", json=self.body)
        if response.status_code == 503:
            assert response.json()["error"]["code"] == "broker_unavailable"
            assert int(response.headers["retry-after"]) >= 1
        return response.status_code, time.perf_counter() - started

    async def until_ready(self, status: int = 200) -> None:
        async with asyncio.timeout(60):
            while (await self.http.get("/readyz")).status_code != status:
                pass

    async def answer(self) -> str:
        """A whole request, from now on."""
        response = await self.http.post("/v1/completions", json=self.body | {"stream": False})
        return str(response.json()["choices"][0]["text"])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


class Stream:
    def __init__(self, response: httpx.Response) -> None:
        self._chunks = response.aiter_text()
        self.text = ""

    async def read_until(self, part: str) -> None:
        async with asyncio.timeout(60):
            while part not in self.text:
                self.text += await anext(self._chunks)

    async def rest(self) -> str:
        async with asyncio.timeout(60):
            async for chunk in self._chunks:
                self.text += chunk
        assert self.text.endswith("data: [DONE]\n\n")
        return self.text

    @property
    def num_letters(self) -> int:
        return self.text.count('"text":"x"')


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> ServedModel:
    return load_served_model(Settings(model=str(smollm2_path), served_model_name="counting", max_model_len=512))


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    broker = EmbeddedValkey(tmp_path, memory_mb=32)
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
async def site(broker: EmbeddedValkey, model: ServedModel) -> AsyncIterator[Site]:
    settings = Settings(redis_url=broker.url, lease_seconds=600, drain_seconds=1, watchdog_seconds=0)
    with serving(settings, model) as server:
        async with (
            connect(broker.url) as redis,
            working(redis, Keys(model.name), settings, Role("worker")) as hand,
            httpx.AsyncClient(base_url=server.base_url, timeout=60) as http,
        ):
            site = Site(broker, redis, server, hand, http)
            await site.until_ready()
            yield site


async def test_a_hang_is_a_503_within_a_second_and_the_stream_goes_on_after_it(site: Site) -> None:
    async with site.stream() as stream:
        site.signal(signal.SIGSTOP)
        try:
            refusals = await asyncio.gather(*(site.refusal() for _ in range(16)))
            await site.until_ready(503)
            assert (await site.http.get("/livez")).status_code == 200
        finally:
            site.signal(signal.SIGCONT)
        assert [status for status, _ in refusals] == [503] * 16
        assert min(seconds for _, seconds in refusals) < 1.0
        assert max(seconds for _, seconds in refusals) < 5.0  # with what a busy machine adds
        site.hand.network.gate.set()
        await stream.rest()
        assert stream.num_letters == NUM_TOKENS
    await site.until_ready()
    assert await site.answer() == "x" * NUM_TOKENS


async def test_full_memory_refuses_the_new_and_ends_the_old(site: Site) -> None:
    async with site.stream() as stream:
        await site.redis.config_set("maxmemory", 1)
        assert (await site.refusal())[0] == 503
        site.hand.network.gate.set()
        await stream.rest()
        assert stream.num_letters == NUM_TOKENS
    await site.redis.config_set("maxmemory", 32 << 20)
    assert await site.answer() == "x" * NUM_TOKENS


async def test_a_cancellation_reaches_a_full_broker(site: Site) -> None:
    async with site.stream():
        await site.redis.config_set("maxmemory", 1)
    await until(lambda: not site.hand.held)  # its client has gone
    await site.redis.config_set("maxmemory", 32 << 20)
    assert await site.answer() == "x" * NUM_TOKENS


async def test_a_master_that_became_a_replica_is_waited_out(site: Site) -> None:
    async with site.stream() as stream:
        await site.redis.replicaof("127.0.0.1", 1)
        assert (await site.refusal())[0] == 503
        site.hand.network.gate.set()
        await site.redis.replicaof("NO", "ONE")
        await stream.rest()
        assert stream.num_letters == NUM_TOKENS
    assert await site.answer() == "x" * NUM_TOKENS


async def test_what_a_flush_forgot_ends_with_an_error(site: Site) -> None:
    async with site.stream() as stream:
        waiting = asyncio.create_task(site.http.post("/v1/completions", json=site.body | {"stream": False}))
        await until(lambda: site.num_in_flight == 2)
        await site.redis.flushall()
        text = await stream.rest()
        assert '"error"' in text
        async with asyncio.timeout(60):
            assert (await waiting).status_code >= 400
        site.hand.network.gate.set()
        await until(lambda: not site.hand.held)  # the worker drops what is nobody's any more
    await site.until_ready()
    assert await site.answer() == "x" * NUM_TOKENS
