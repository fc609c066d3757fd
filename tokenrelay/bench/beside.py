"""How long running streams stand still while a long prompt arrives beside them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from itertools import chain, pairwise

from tokenrelay.bench.client import Client
from tokenrelay.bench.figures import Figures, percentiles
from tokenrelay.bench.measured import Measured, TargetError
from tokenrelay.bench.workload import Workload

SETTLE_CHUNKS = 10  # of every stream, before anything counts
ALONE_SECONDS = 3.0


class Streams:
    """So many that run for as long as the block does; one that ends is followed by the next."""

    def __init__(self, client: Client, model: str, workload: Workload) -> None:
        self._client, self._model, self._workload = client, model, workload
        self._rng = random.Random()
        self.requests: list[list[Measured]] = [[] for _ in range(workload.clients)]

    async def __aenter__(self) -> Streams:
        self._tasks = [asyncio.create_task(self._stream(requests)) for requests in self.requests]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def heard(self, num_chunks: int, since: float = 0.0) -> None:
        """From each of them."""
        while min(self._count(requests, since) for requests in self.requests) < num_chunks:
            await asyncio.sleep(0.01)
            for task in self._tasks:
                if task.done():
                    task.result()

    def _count(self, requests: list[Measured], since: float) -> int:
        return sum(arrival > since for request in requests for arrival in request.arrivals)

    async def _stream(self, requests: list[Measured]) -> None:
        while True:
            requests.append(Measured(time.perf_counter()))
            body = self._workload.body(self._model, self._workload.prompt(self._rng))
            checked(await self._client.complete(body, requests[-1]))


async def beside(client: Client, model: str, workload: Workload, alone_seconds: float = ALONE_SECONDS) -> Figures:
    """The streams' gaps alone, and those from when the prompt is sent until its first token."""
    async with Streams(client, model, workload) as streams:
        await streams.heard(SETTLE_CHUNKS)
        settled = time.perf_counter()
        await asyncio.sleep(alone_seconds)
        long = Measured(time.perf_counter())
        prompt = workload.prompt(random.Random(), workload.beside)
        checked(await client.complete(workload.body(model, prompt, output_tokens=2), long))
        await streams.heard(1, since=long.arrivals[0])  # a stream that stood still all the time has its gap now
    requests = [request for requests in streams.requests for request in requests]
    return {
        "prefill_seconds": long.time_to_first_token,
        "prefill_tokens_per_second": long.prompt_tokens / long.time_to_first_token,
        **gap_figures("alone", gaps_within(requests, settled, long.started)),
        **gap_figures("beside", gaps_across(requests, long.started, long.arrivals[0])),
    }


def gaps_within(requests: list[Measured], start: float, end: float) -> list[float]:
    return [later - earlier for earlier, later in _pairs(requests) if start <= earlier and later <= end]


def gaps_across(requests: list[Measured], start: float, end: float) -> list[float]:
    """Any part of which was in this time."""
    return [later - earlier for earlier, later in _pairs(requests) if start < later and earlier < end]


def _pairs(requests: list[Measured]) -> Iterator[tuple[float, float]]:
    return chain.from_iterable(pairwise(request.arrivals) for request in requests)


def gap_figures(name: str, gaps: list[float]) -> Figures:
    worst = {f"{name}_gap_worst_ms": max(gaps) * 1e3} if gaps else {}
    return percentiles(f"{name}_gap", gaps, (0.5, 0.99)) | worst | {f"{name}_gaps": len(gaps)}


def checked(measured: Measured) -> Measured:
    """For requests without which there is nothing to measure."""
    if measured.error:
        raise TargetError(measured.error)
    return measured
