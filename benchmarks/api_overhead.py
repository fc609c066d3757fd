"""What the API adds, with an engine that takes no time: ``python -m benchmarks.api_overhead``.

One API process and a broker, each as ``tokenrelay serve`` starts it. This process is their worker and all their
clients: a step publishes one token for every stream, and is at most a few steps ahead of the slowest client. The
processor time of the API process says what one core of it could do if nothing else took the machine's time.
"""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import psutil

from tokenrelay.service.broker import connect
from tokenrelay.service.embedded_valkey import EmbeddedValkey
from tokenrelay.service.keys import Keys
from tokenrelay.service.messages import Event, Usage, WorkerFacts
from tokenrelay.service.queue import Claim, Queue
from tokenrelay.service.registry import Registry
from tokenrelay.service.settings import Settings
from tokenrelay.service.token_log import Publication, TokenLog

MODEL, WORKER = "smollm2-135m-instruct", "bench"
STREAMS, TOKENS, FIRSTS, ROUNDS = 64, 1000, 200, 3
AHEAD = 16  # steps
POLL_SECONDS = 0.0002
TEXT = " word"
CHUNK = b"data: {"
HEAD = (
    "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n"
)
RUN_API = """
import socket
from tokenrelay.service.api.server import run_api
from tokenrelay.service.settings import Settings
run_api(Settings(), sock=socket.socket(fileno={fd}))
"""


class Client(asyncio.Protocol):
    """One streamed chat, as cheap as can be: counts chunks."""

    def __init__(self, max_tokens: int) -> None:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": max_tokens}
        content = json.dumps({**body, "stream": True}).encode()
        self._request = HEAD.format(len(content)).encode() + content
        self.num_chunks, self.num_bytes = 0, 0
        self.first = 0.0  # when the first chunk with text came
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.sent = time.perf_counter()
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.num_chunks += data.count(CHUNK)
        self.num_bytes += len(data)
        if not self.first and b'"content":"' + TEXT.encode() in data:
            self.first = time.perf_counter()
        if b"data: [DONE]" in data:
            self.ended.set_result(None)


class Engine:
    """A worker whose tokens cost nothing."""

    def __init__(self, queue: Queue, token_log: TokenLog, registry: Registry) -> None:
        self._queue, self._token_log, self._registry = queue, token_log, registry

    async def announce(self) -> None:
        await self._registry.announce(WorkerFacts(worker_id=WORKER, model=MODEL, max_model_len=2048, step_counter=1))

    async def claim(self, count: int) -> list[Claim]:
        """So many, as they come."""
        claims: list[Claim] = []
        while len(claims) < count:
            claims += await self._queue.claim(WORKER, count - len(claims))
            await asyncio.sleep(POLL_SECONDS)
        return claims

    async def step(self, claims: list[Claim], index: int) -> None:
        event = Event(token_ids=[index], text=TEXT)
        await self._token_log.publish(
            WORKER, [Publication(claim.submission.request_id, claim.epoch, index, [event]) for claim in claims]
        )

    async def finish(self, claim: Claim, index: int) -> None:
        usage = Usage(prompt_tokens=1, completion_tokens=index)
        last = Event(token_ids=[index], text=TEXT, finish_reason="length", usage=usage)
        await self._token_log.finish(WORKER, Publication(claim.submission.request_id, claim.epoch, index, [last]))


async def first_tokens(engine: Engine, port: int) -> list[tuple[float, float]]:
    """Milliseconds until a request is claimed, and from there to its first token, one request at a time."""
    times = []
    for _ in range(FIRSTS):
        async with clients(port, 1, 1) as (client,):
            (claim,) = await engine.claim(1)
            claimed = time.perf_counter()
            await engine.finish(claim, 1)
            await client.ended
            times.append((1000 * (claimed - client.sent), 1000 * (client.first - claimed)))
    return times


async def streams(engine: Engine, port: int) -> int:
    """How many bytes the clients got."""
    async with clients(port, STREAMS, TOKENS) as reading:
        claims = await engine.claim(STREAMS)
        for index in range(1, TOKENS):
            await engine.step(claims, index)
            while min(client.num_chunks for client in reading) < index - AHEAD:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0)
        for claim in claims:
            await engine.finish(claim, TOKENS)
        await asyncio.gather(*(client.ended for client in reading))
        return sum(client.num_bytes for client in reading)


@asynccontextmanager
async def clients(port: int, count: int, max_tokens: int) -> AsyncIterator[list[Client]]:
    loop = asyncio.get_running_loop()
    opened = [await loop.create_connection(lambda: Client(max_tokens), "127.0.0.1", port) for _ in range(count)]
    try:
        yield [client for _, client in opened]
    finally:
        for transport, _ in opened:
            transport.abort()


@contextmanager
def api_process(settings: Settings) -> Iterator[tuple[psutil.Process, int]]:
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        fd, port = listener.fileno(), listener.getsockname()[1]
        command = [sys.executable, "-c", RUN_API.format(fd=fd)]
        process = subprocess.Popen(command, env=settings.as_environment(), pass_fds=[fd], stderr=subprocess.DEVNULL)
    try:
        yield psutil.Process(process.pid), port
    finally:
        process.terminate()
        process.wait()


async def measure(settings: Settings, api: psutil.Process, port: int) -> None:
    async with connect(settings.redis_url) as redis:
        relay = (redis, Keys(MODEL), settings)
        engine = Engine(Queue(*relay), TokenLog(*relay), Registry(*relay))
        await engine.announce()
        await first_tokens(engine, port)  # to warm up
        await engine.announce()
        to_engine, to_client = zip(*await first_tokens(engine, port), strict=True)
        total = statistics.median(map(sum, zip(to_engine, to_client, strict=True)))
        print(
            f"first token: {total:.1f} ms at the median, the broker's part included: {statistics.median(to_engine):.1f}"
            f" until a worker has the request, {statistics.median(to_client):.1f} until the client has its answer"
        )
        for _ in range(ROUNDS):
            await engine.announce()
            await measure_streams(engine, api, port)


async def measure_streams(engine: Engine, api: psutil.Process, port: int) -> None:
    before, started = sum(api.cpu_times()[:2]), time.perf_counter()
    num_bytes = await streams(engine, port)
    elapsed, busy = time.perf_counter() - started, sum(api.cpu_times()[:2]) - before
    num_tokens = STREAMS * TOKENS
    print(
        f"{STREAMS} streams: {num_tokens / elapsed:,.0f} tokens/s; of the API's core {busy / num_tokens * 1e6:.0f} µs"
        f" a token, so {num_tokens / busy:,.0f} tokens/s of a whole one; {num_bytes / num_tokens:.0f} bytes a token"
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        valkey = EmbeddedValkey(Path(folder), memory_mb=512)
        valkey.start()
        try:
            settings = Settings(redis_url=valkey.url, model=MODEL, log_level="warning", request_timeout_seconds=300)
            with api_process(settings) as (api, port):
                asyncio.run(measure(settings, api, port))
        finally:
            valkey.stop()


if __name__ == "__main__":
    main()
