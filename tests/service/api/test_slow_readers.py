"""Clients that read a byte a second: they take little memory, disturb nobody, are cut off, and may come back."""

from __future__ import annotations

import array
import asyncio
import fcntl
import json
import socket
import termios
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tests.service.api.serving import Endpoint, Server, api_process, sse_events, wait_for, words, working
from tests.service.api.test_overload import percentile
from tokenrelay.service.api.http.connection import STALL_SECONDS, Connection
from tokenrelay.service.embedded_valkey import EmbeddedValkey
from tokenrelay.service.messages import encode
from tokenrelay.service.settings import Settings

NUM_TOKENS = 700  # some 160 KB of stream
RECEIVE_BUFFER = 4096  # bytes, of a client: a phone's, say
STALL = 1.0  # seconds, in short tests
FULL, MAX_BUFFERED = 32 << 10, 256 << 10  # bytes per reader, in this process and in the kernel


class SlowReader:
    """Reads ``/v1/requests/{id}/stream``, or a new stream, a byte a second."""

    def __init__(self, port: int, request: bytes) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        self._socket.connect(("127.0.0.1", port))
        self._socket.sendall(request)
        self._socket.setblocking(False)
        self.received = b""

    async def read(self) -> None:
        """Until the connection ends."""
        loop = asyncio.get_running_loop()
        with suppress(ConnectionError):
            while byte := await loop.sock_recv(self._socket, 1):
                self.received += byte
                await asyncio.sleep(1.0)

    def close(self) -> None:
        self._socket.close()


def resumption(request_id: str, last_id: str = "0") -> bytes:
    path = f"/v1/requests/{request_id}/stream?starting_after={last_id}"
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


def new_stream(model: str) -> bytes:
    body = json.dumps({"model": model, "prompt": "Once", "max_tokens": NUM_TOKENS, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


@asynccontextmanager
async def slow_readers(port: int, requests: Sequence[bytes]) -> AsyncIterator[list[SlowReader]]:
    readers = [SlowReader(port, request) for request in requests]
    reading = [asyncio.create_task(reader.read()) for reader in readers]
    try:
        yield readers
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        for reader in readers:
            reader.close()


def text_of(stream: str) -> str:
    chunks = [json.loads(event["data"]) for event in sse_events(stream) if event["data"] != "[DONE]"]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


async def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    await asyncio.to_thread(wait_for, condition, seconds)


# --- what the process holds for them ----------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenrelay.service.api.http.connection.STALL_SECONDS", STALL)


def unsent(connection: Connection) -> int:
    """Bytes that wait here and in the kernel for the client."""
    queued = array.array("i", [0])
    with suppress(OSError):  # closed meanwhile
        fcntl.ioctl(connection.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, queued)
    return queued[0] + connection.transport.get_write_buffer_size()


def undelivered(server: Server) -> int:
    """Bytes of the events that wait for streams, as they came from the broker; as objects they take about thrice."""
    subscriptions = list(server.process.generations._mailbox._subscriptions.values())
    return sum(
        len(encode(event)) for group in subscriptions for reader in list(group) for _, event in [*reader._buffer]
    )


@pytest.mark.usefixtures("impatient")
async def test_a_slow_reader_is_bounded_cut_off_and_may_come_back(server: Server, http: httpx.AsyncClient) -> None:
    held: list[int] = []
    async with working(server, length=NUM_TOKENS, pace=0.0) as worker:
        async with slow_readers(server.port, [new_stream(server.model)] * 2) as readers:
            await until(lambda: len(server.connections) == len(readers))

            def all_gone() -> bool:
                held.append(sum(map(unsent, server.connections)) + 3 * undelivered(server))
                return not server.connections

            await until(all_gone)
            assert not any(b"[DONE]" in reader.received for reader in readers)
        for claim in worker.claims:
            stream = (await http.get(f"/v1/requests/{claim.submission.request_id}/stream")).text
            assert "error" not in stream, stream[-300:]
            assert text_of(stream) == words(NUM_TOKENS)
        assert worker.cancelled == {}
    assert len(readers) * FULL < max(held) < len(readers) * MAX_BUFFERED


@pytest.mark.usefixtures("impatient")
async def test_a_client_that_reads_what_it_gets_is_never_cut_off(server: Server) -> None:
    """However long it takes: at a hundredth of the server's speed it makes room again and again."""
    small = httpx.AsyncHTTPTransport(socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 * RECEIVE_BUFFER)])
    async with (
        working(server, length=NUM_TOKENS, pace=0.0),
        httpx.AsyncClient(base_url=server.base_url, transport=small, timeout=60) as http,
    ):
        body = {"model": server.model, "prompt": "Once", "max_tokens": NUM_TOKENS}
        request_id = (await http.post("/v1/completions", json=body)).headers["x-response-id"]
        started, text = time.monotonic(), ""
        async with http.stream("GET", f"/v1/requests/{request_id}/stream") as response:
            async for chunk in response.aiter_text(2048):
                text += chunk
                await asyncio.sleep(STALL / 50)  # the kernel makes room known every half buffer: eight of these
    assert text_of(text) == words(NUM_TOKENS)
    assert time.monotonic() - started > STALL


@pytest.mark.usefixtures("impatient")
async def test_a_connection_that_ends_does_not_wait_for_its_reader(server: Server) -> None:
    """The answer is complete and all of it in our hands: nothing but the client holds it open."""
    async with working(server, length=200, pace=0.0):
        request = new_stream(server.model).replace(b"Host: x", b"Host: x\r\nConnection: close")
        async with slow_readers(server.port, [request]):
            await until(lambda: [c for c in server.connections if c.cycle and c.cycle.response_complete])
            await until(lambda: not server.connections)


# --- the figures, at a process of its own -----------------------------------------------------------------------------


@pytest.fixture
async def process(valkey: EmbeddedValkey, smollm2_path: Path) -> AsyncIterator[tuple[psutil.Process, Endpoint]]:
    settings = Settings(redis_url=valkey.url, model=str(smollm2_path), served_model_name="readers", max_model_len=2048)
    async with api_process(settings, "readers") as (process, endpoint):
        yield psutil.Process(process.pid), endpoint


async def gaps(endpoint: Endpoint, seconds: float) -> list[float]:
    """Between the tokens of eight streams that are read at once."""
    found: list[float] = []

    async def read(http: httpx.AsyncClient) -> None:
        body = {"model": endpoint.model, "prompt": "Once", "max_tokens": NUM_TOKENS, "stream": True}
        last, ends = 0.0, time.monotonic() + seconds
        async with http.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                now = time.monotonic()
                if now > ends:
                    return
                if line.startswith("data: {"):
                    found.extend([now - last] if last else [])
                    last = now

    async with httpx.AsyncClient(base_url=endpoint.base_url, timeout=60) as http:
        await asyncio.gather(*(read(http) for _ in range(8)))
    return found


async def finished_request(endpoint: Endpoint) -> str:
    """The id of a long stream that is in the log."""
    async with httpx.AsyncClient(base_url=endpoint.base_url, timeout=60) as http, working(endpoint, length=NUM_TOKENS):
        body = {"model": endpoint.model, "prompt": "Once", "max_tokens": NUM_TOKENS}
        response = await http.post("/v1/completions", json=body)
    return response.headers["x-response-id"]


def num_connected(api: psutil.Process, endpoint: Endpoint) -> int:
    at_port = [c for c in api.net_connections() if c.raddr and c.laddr.port == endpoint.port]
    return sum(c.status == psutil.CONN_ESTABLISHED for c in at_port)


async def repeated(measure: Callable[[], Awaitable[list[float]]], times: int) -> list[float]:
    return [percentile(await measure(), 0.99) for _ in range(times)]


@pytest.mark.long
async def test_fifty_slow_readers_beside_eight_others(process: tuple[psutil.Process, Endpoint]) -> None:
    api, endpoint = process
    request_id = await finished_request(endpoint)
    async with working(endpoint, length=10**6, pace=0.02):
        await gaps(endpoint, 3)  # warm
        alone = await repeated(lambda: gaps(endpoint, 8), 3)
        resident, started = api.memory_info().rss, time.monotonic()
        async with slow_readers(endpoint.port, [resumption(request_id)] * 50) as readers:
            beside = await repeated(lambda: gaps(endpoint, 8), 3)
            growth = (api.memory_info().rss - resident) / len(readers)
            assert num_connected(api, endpoint) >= len(readers)
            await until(lambda: not num_connected(api, endpoint), STALL_SECONDS)
            cut_after = time.monotonic() - started
    async with httpx.AsyncClient(base_url=endpoint.base_url, timeout=60) as http:
        for reader in readers:
            seen = reader.received.partition(b"\r\n\r\n")[2].decode()
            ids = [line.removeprefix("id: ") for line in seen.split("\n")[:-1] if line.startswith("id: ")]
            rest = await http.get(f"/v1/requests/{request_id}/stream", params={"starting_after": (ids or ["0"])[-1]})
            assert text_of(rest.text).endswith(words(NUM_TOKENS)[-100:])
    print(f"p99 between tokens: alone {alone}, beside {beside}; {growth / 1024:.0f} KB each; cut by {cut_after:.0f} s")
    assert sorted(beside)[1] <= 1.1 * sorted(alone)[1]
    assert growth < MAX_BUFFERED
    assert cut_after < STALL_SECONDS + 15
