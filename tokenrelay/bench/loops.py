"""Closed loop: so many clients, each sends when its last request has ended. Open loop: requests come as they come."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

from tokenrelay.bench.measured import Measured, Run

Send = Callable[[bytes, Measured], Awaitable[Measured]]


async def closed_loop(send: Send, bodies: Sequence[bytes], clients: int) -> Run:
    """Throughput: the server sets the pace."""
    remaining, requests = iter(bodies), list[Measured]()

    async def client() -> None:
        for body in remaining:
            requests.append(await send(body, Measured(time.perf_counter())))

    return await _timed(requests, (client() for _ in range(clients)))


async def open_loop(send: Send, bodies: Sequence[bytes], rate: float, rng: random.Random) -> Run:
    """Latency under a given load: Poisson arrivals, whatever the server does.

    Times count from when a request was due, so a client that is late does not flatter the server.
    """
    requests, begin, after = list[Measured](), time.perf_counter(), 0.0

    async def arrival(body: bytes, due: float) -> None:
        await asyncio.sleep(due - time.perf_counter())
        requests.append(await send(body, Measured(due)))

    arrivals = [arrival(body, begin + (after := after + rng.expovariate(rate))) for body in bodies]
    return await _timed(requests, arrivals)


async def _timed(requests: list[Measured], work: Iterable[Awaitable[None]]) -> Run:
    started, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*work)
    return Run(requests, time.perf_counter() - started, time.process_time() - cpu)
