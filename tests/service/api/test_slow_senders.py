"""Clients that never finish sending are disconnected, and nobody else notices them; a request that came is answered."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from tests.service.api.serving import Endpoint, Server, api_process, wait_for
from tests.service.api.test_overload import percentile
from tokenrelay.service.api.http.connection import Connection
from tokenrelay.service.embedded_valkey import EmbeddedValkey
from tokenrelay.service.settings import Settings

SLOWHTTPTEST = shutil.which("slowhttptest")
HEAD = b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Slow: "
BODY = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 4096\r\n\r\n"
    b'{"prompt": "'
)
ANSWERED_BODY = BODY.replace(b"/v1/completions", b"/nowhere")
NOTHING = b""
PATIENCE = 1.5  # seconds, in short tests: the clients are fifty in one thread, which may have to wait for its turn
CLOSED_WITHIN = 10.0
ARRIVALS = 250  # per second, as slowhttptest's below
ALIVE_WITHIN = 0.05


class Ending(NamedTuple):
    """What the server sent, and after how many seconds it closed the connection."""

    reply: bytes
    seconds: float


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenrelay.service.api.http.connection.HEAD_SECONDS", PATIENCE)
    monkeypatch.setattr("tokenrelay.service.api.http.connection.LINGER_SECONDS", PATIENCE)
    monkeypatch.setattr("tokenrelay.service.api.http.body.BODY_SECONDS", PATIENCE)


async def drip(port: int, beginning: bytes, pace: float, delay: float = 0.0) -> Ending:
    """After a delay send a beginning, then a byte every ``pace`` seconds, until the server closes."""
    await asyncio.sleep(delay)
    started = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(beginning)
    reply = bytearray()
    with suppress(ConnectionError):
        while not reader.at_eof():
            with suppress(TimeoutError):
                async with asyncio.timeout(pace):
                    reply += await reader.read(4096)
                    continue
            if beginning:
                writer.write(b"x")
    seconds = time.monotonic() - started
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
    return Ending(bytes(reply), seconds)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("beginning", "status"), [(NOTHING, b""), (HEAD, b" 408 "), (BODY, b" 408 "), (ANSWERED_BODY, b" 404 ")]
)
async def test_who_does_not_finish_is_disconnected(server: Server, beginning: bytes, status: bytes) -> None:
    endings = await asyncio.gather(*(drip(server.port, beginning, PATIENCE / 10) for _ in range(50)))
    for ending in endings:
        assert status in ending.reply.partition(b"\r\n")[0]
        assert PATIENCE / 2 < ending.seconds < CLOSED_WITHIN
        if status:
            assert json.loads(ending.reply.partition(b"\r\n\r\n")[2])["error"]["message"]
    wait_for(lambda: not server.connections)


@pytest.mark.usefixtures("impatient")
async def test_a_head_that_follows_an_answer_has_no_more_time(server: Server) -> None:
    whole = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    for beginning in (whole + HEAD, whole + whole + HEAD):
        ending = await drip(server.port, beginning, PATIENCE / 10)
        assert (ending.reply.count(b" 200 "), ending.reply.count(b" 408 ")) == (beginning.count(whole), 1)
        assert ending.seconds < CLOSED_WITHIN


@pytest.mark.usefixtures("impatient")
async def test_a_large_body_has_the_time_that_it_takes(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenrelay.service.api.http.body.BODY_BYTES_PER_SECOND", 1000)
    begun = time.monotonic()

    async def content() -> AsyncIterator[bytes]:
        yield b'{"prompt": "'
        while time.monotonic() < begun + 2 * PATIENCE:
            yield b"x" * 1000
            await asyncio.sleep(PATIENCE / 10)  # the pace of the line
        yield b'", "model": "unknown"}'

    async with httpx.AsyncClient(base_url=server.base_url, timeout=60) as http:
        response = await http.post("/v1/completions", content=content(), headers={"content-type": "application/json"})
    assert response.status_code == 404  # of the model: it was read


async def only_connection(server: Server) -> Connection:
    """Those of earlier tests may be closing still."""
    await asyncio.to_thread(wait_for, lambda: len(server.connections) == 1)
    return server.connections[0]


async def test_an_idle_connection_stays_for_longer_than_clients_keep_theirs(server: Server) -> None:
    async with httpx.AsyncClient(base_url=server.base_url, timeout=60) as http:
        await http.get("/livez")
        connection = await only_connection(server)
        await asyncio.to_thread(wait_for, lambda: connection.timeout_keep_alive_task)
        timer = connection.timeout_keep_alive_task
        assert timer
        assert timer.when() - connection.loop.time() > 60
        assert connection._receiving is None


async def test_a_connection_whose_body_ended_after_its_answer_is_idle(server: Server) -> None:
    """As any other: it is closed when no request follows."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab")
    head = await reader.readuntil(b"\r\n\r\n")
    assert b" 404 " in head
    writer.write(b"cde")
    connection = await only_connection(server)
    await asyncio.to_thread(wait_for, lambda: connection.timeout_keep_alive_task and not connection._receiving)
    writer.close()
    await writer.wait_closed()


async def test_a_request_that_comes_as_its_idle_connection_is_closed_is_answered(server: Server) -> None:
    """It is in the socket already when the time is up: closing would reset the connection instead."""
    request = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    sender = socket.fromfd(writer.get_extra_info("socket").fileno(), socket.AF_INET, socket.SOCK_STREAM)
    sender.send(request)
    await reader.readuntil(b'"ok"}')
    connection = await only_connection(server)
    await asyncio.to_thread(wait_for, lambda: connection.is_idle)

    def time_is_up() -> None:
        sender.send(request)
        connection.timeout_keep_alive_handler()

    connection.loop.call_soon_threadsafe(time_is_up)
    assert b" 200 " in await reader.readuntil(b'"ok"}')
    connection.loop.call_soon_threadsafe(connection.timeout_keep_alive_handler)
    assert await reader.read() == b""
    sender.close()
    writer.close()
    await writer.wait_closed()


# --- the figures, at a process of its own -----------------------------------------------------------------------------


async def latencies(endpoint: Endpoint, seconds: float) -> list[float]:
    """Of /livez, one after the other."""
    taken: list[float] = []
    async with httpx.AsyncClient(base_url=endpoint.base_url, timeout=60) as http:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            started = time.monotonic()
            assert (await http.get("/livez")).status_code == 200
            taken.append(time.monotonic() - started)
            await asyncio.sleep(0.01)
    return taken


@pytest.fixture
async def endpoint(valkey: EmbeddedValkey, smollm2_path: Path) -> AsyncIterator[Endpoint]:
    settings = Settings(redis_url=valkey.url, model=str(smollm2_path), served_model_name="slow", max_model_len=2048)
    async with api_process(settings, "slow") as (_, endpoint):
        yield endpoint


@pytest.mark.long
@pytest.mark.parametrize("beginning", [HEAD, BODY])
async def test_five_hundred_slow_senders_disturb_nobody(endpoint: Endpoint, beginning: bytes) -> None:
    alone = await latencies(endpoint, 5)
    probing = asyncio.create_task(latencies(endpoint, CLOSED_WITHIN + 2))
    endings = await asyncio.gather(*(drip(endpoint.port, beginning, 1.0, n / ARRIVALS) for n in range(500)))
    beside = await probing
    slowest = max(ending.seconds for ending in endings)
    figures = [1000 * percentile(taken, 0.99) for taken in (alone, beside)]
    print(f"/livez p99 alone, beside 500: {figures} ms; closed within {slowest:.1f} s")
    assert slowest <= CLOSED_WITHIN
    assert percentile(beside, 0.99) <= max(ALIVE_WITHIN, 2 * percentile(alone, 0.99))


@pytest.mark.long
@pytest.mark.skipif(not SLOWHTTPTEST, reason="slowhttptest is not installed")
@pytest.mark.parametrize("mode", ["-H", "-B"])
async def test_slowhttptest_finds_the_service_available(endpoint: Endpoint, mode: str, tmp_path: Path) -> None:
    path = "/livez" if mode == "-H" else "/v1/completions"
    options = [mode, "-c", "500", "-r", "250", "-i", "5", "-l", "20", "-p", "3", "-u", endpoint.base_url + path]
    options += ["-f", "application/json", "-g", "-o", str(tmp_path / "statistics")]
    alone = await latencies(endpoint, 5)
    attack = subprocess.Popen([str(SLOWHTTPTEST), *options], stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
    beside = await latencies(endpoint, 18)
    report, _ = await asyncio.to_thread(attack.communicate)
    figures = [1000 * percentile(taken, 0.99) for taken in (alone, beside)]
    states = (tmp_path / "statistics.csv").read_text().splitlines()
    print(f"/livez p99 alone, beside slowhttptest {mode}: {figures} ms; {states[0]}: {states[1:]}")
    assert "No open connections left" in report, report[-500:]
    assert percentile(beside, 0.99) <= max(ALIVE_WITHIN, 2 * percentile(alone, 0.99))
