"""Alive, ready, draining: what an orchestrator sees."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from tests.service.api.serving import Endpoint, Server, api_process, serving, words, working
from tokenrelay import __version__
from tokenrelay.service.api.operations.readiness import Readiness
from tokenrelay.service.api.served_model import ServedModel
from tokenrelay.service.broker import connect
from tokenrelay.service.embedded_valkey import EmbeddedValkey
from tokenrelay.service.messages import VERSION, WorkerFacts
from tokenrelay.service.registry import Registry
from tokenrelay.service.settings import Settings


async def test_no_worker_is_not_ready_but_alive(server: Server, http: httpx.AsyncClient) -> None:
    assert (await http.get("/livez")).status_code == 200
    for path in ("/readyz", "/health"):
        response = await http.get(path)
        assert (response.status_code, response.json()["reason"]) == (503, "no worker is running")


async def test_a_worker_makes_it_ready_until_it_drains(server: Server, http: httpx.AsyncClient) -> None:
    async with working(server) as worker:
        await until_status(http, 200)
        worker.draining = True
        await until_status(http, 503)


async def until_status(http: httpx.AsyncClient, status: int) -> None:
    async with asyncio.timeout(60):
        while (await http.get("/readyz")).status_code != status:
            pass


async def test_a_request_without_a_worker_waits_for_one(server: Server, client: AsyncOpenAI) -> None:
    asking = asyncio.create_task(client.completions.create(model=server.model, prompt="Once"))
    async with connect(server.settings.redis_url) as redis:
        while not await redis.zcard(server.keys.waiting):
            assert not asking.done()
    async with working(server):
        assert (await asking).choices[0].text == words(8)


class _Announced(Registry):
    def __init__(self, *workers: WorkerFacts) -> None:
        self.announced = list(workers)

    async def workers(self) -> list[WorkerFacts]:
        return self.announced


def facts(**fields: Any) -> WorkerFacts:
    return WorkerFacts(worker_id="w", model="m", max_model_len=1, step_counter=7, **fields)


@pytest.mark.parametrize(
    ("workers", "reason"),
    [
        ([facts()], None),
        ([facts(spare=True)], None),
        ([], "no worker is running"),
        ([facts(draining=True), facts(stalled=True)], "every worker is draining or makes no progress"),
        ([facts(draining=True), facts()], None),
        ([facts(protocol=VERSION - 1)], "every worker is older than this server"),
        ([facts(protocol=VERSION - 1), facts(protocol=VERSION + 1)], None),
    ],
)
async def test_ready_is_what_workers_say_of_themselves(workers: list[WorkerFacts], reason: str | None) -> None:
    """However often it says hello, a worker whose engine hangs says so as well."""
    assert await Readiness(_Announced(*workers)).observe() == reason


async def test_a_dead_broker_is_503_with_retry_after_and_the_server_recovers(
    tmp_path: Path, served_model: ServedModel
) -> None:
    broker = EmbeddedValkey(tmp_path / "valkey", memory_mb=32)
    settings = Settings(redis_url=broker.start(), drain_seconds=0.5)
    with serving(settings, served_model) as server:
        async with httpx.AsyncClient(base_url=server.base_url, timeout=60) as http:
            broker.stop()
            response = await http.get("/readyz")
            assert (response.status_code, response.json()["reason"]) == (503, "the broker does not answer")
            fields = {"model": server.model, "prompt": "Once"}
            refused = await http.post("/v1/completions", json=fields)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "broker_unavailable")
            assert int(refused.headers["retry-after"]) >= 1
            assert (await http.get("/livez")).status_code == 200
            broker.start()
            async with working(server):
                await until_status(http, 200)
                assert (await http.post("/v1/completions", json=fields)).json()["choices"][0]["text"] == words(8)
    broker.stop()


async def test_version_and_documentation(server: Server, http: httpx.AsyncClient) -> None:
    assert (await http.get("/version")).json() == {"version": __version__}
    assert "swagger" in (await http.get("/docs")).text


async def test_a_large_prompt_does_not_hold_up_livez(server: Server, client: AsyncOpenAI) -> None:
    """Tokenizing a megabyte takes seconds; a probe waits for a part of it at most, whatever else the machine does."""
    text = "The quick brown fox jumps over the lazy dog. " * 25_000

    asking = asyncio.create_task(client.completions.create(model=server.model, prompt=text))
    asked, slowest = time.perf_counter(), 0.0
    async with httpx.AsyncClient(base_url=server.base_url, timeout=60) as probe:
        while not asking.done():
            started = time.perf_counter()
            await probe.get("/livez")
            slowest = max(slowest, time.perf_counter() - started)
    with pytest.raises(openai.BadRequestError, match="250001 tokens"):
        await asking
    assert slowest < 0.5 * (time.perf_counter() - asked)


def test_importing_the_app_leaves_torch_out() -> None:
    code = "import sys, tokenrelay.service.api.server; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


CRIPPLED = """
from tokenrelay.service.api.server import run_api
from tokenrelay.service.mailbox import Mailbox
from tokenrelay.service.settings import Settings

async def fail(mailbox):
    raise RuntimeError("a bug")

Mailbox.run = fail
run_api(Settings(port=0))
"""


def test_a_process_that_can_serve_nobody_ends_itself(valkey: EmbeddedValkey, smollm2_path: Path) -> None:
    settings = drained(valkey, smollm2_path, "crippled", seconds=20)
    run = subprocess.run([sys.executable, "-c", CRIPPLED], env=settings.as_environment(), timeout=150, check=False)
    assert run.returncode == 1


class TestDrain:
    """SIGTERM, on a process of its own."""

    async def test_streams_finish_and_the_exit_code_is_0(self, valkey: EmbeddedValkey, smollm2_path: Path) -> None:
        settings = drained(valkey, smollm2_path, "drain-long", seconds=20)
        async with (
            api_process(settings, settings.served_model_name) as (process, server),
            working(server, held_back=True) as worker,
            AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0) as client,
        ):
            stream = await client.completions.create(model=server.model, prompt="Once", stream=True)
            process.send_signal(signal.SIGTERM)
            await refuses_connections(server)
            worker.gate.set()
            assert "".join([chunk.choices[0].text async for chunk in stream]) == words(8)
            assert await asyncio.to_thread(process.wait, 60) == 0

    async def test_streams_that_outlive_it_end_with_an_error_and_their_requests_go_on(
        self, valkey: EmbeddedValkey, smollm2_path: Path
    ) -> None:
        settings = drained(valkey, smollm2_path, "drain-short", seconds=0.3)
        fields = {"model": settings.served_model_name, "prompt": "Once", "stream": True}
        async with (
            api_process(settings, settings.served_model_name) as (process, server),
            working(server, held_back=True) as worker,
            httpx.AsyncClient(base_url=server.base_url, timeout=60) as http,
        ):
            async with http.stream("POST", "/v1/completions", json=fields) as response:
                process.send_signal(signal.SIGTERM)
                text = (await response.aread()).decode()
            assert '"code":"unavailable"' in text
            assert text.endswith("data: [DONE]\n\n")
            assert await asyncio.to_thread(process.wait, 60) == 0
            assert worker.cancelled == {}


def drained(valkey: EmbeddedValkey, model: Path, name: str, *, seconds: float) -> Settings:
    return Settings(redis_url=valkey.url, model=str(model), served_model_name=name, drain_seconds=seconds)


async def refuses_connections(server: Endpoint) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            except ConnectionError:  # refused; reset, if the socket closed while this one waited in its backlog
                return
            writer.close()
