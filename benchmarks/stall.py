"""How long running streams stand still while a long prompt arrives beside them.

Starts the streams, waits until all have begun, sends the prompt, and compares the gaps between the streams' chunks
before it, while it is prefilled, and after. The last line is JSON. ``make bench-stall BENCH="http://127.0.0.1:8000"``.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.serving import Measured, Workload, note, percentile

SETTLE_CHUNKS = 10  # of every stream, before the prompt is sent
ALONE_SECONDS = 3.0


async def follow(url: str, body: dict[str, Any], measured: Measured) -> None:
    """Note the chunks' arrivals as they come."""
    async with (
        httpx.AsyncClient(timeout=600) as client,
        client.stream("POST", f"{url}/v1/completions", json=body) as response,
    ):
        if response.status_code != 200:
            raise SystemExit(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                note(measured, json.loads(line[6:]))


async def measure(url: str, model: str, streams: int, prompt_tokens: int) -> tuple[list[Measured], Measured]:
    """The streams, and the long request. Streams end with it, or they would be measured beside nothing."""
    rng = random.Random()
    running = [Measured(time.perf_counter()) for _ in range(streams)]
    body = Workload(model, 32, 4096, 0).body
    tasks = [asyncio.create_task(follow(url, body(rng), measured)) for measured in running]
    while min(len(measured.arrivals) for measured in running) < SETTLE_CHUNKS:
        await asyncio.sleep(0.01)
        for task in tasks:
            if task.done():
                task.result()
                raise SystemExit("a stream ended too soon")
    await asyncio.sleep(ALONE_SECONDS)
    long = Measured(time.perf_counter())
    await follow(url, Workload(model, prompt_tokens, 2, 0).body(rng), long)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return running, long


def gaps_between(running: list[Measured], start: float, end: float) -> list[float]:
    """Milliseconds between chunks; a gap counts where it ends."""
    return [
        (later - earlier) * 1e3
        for measured in running
        for earlier, later in zip(measured.arrivals, measured.arrivals[1:], strict=False)
        if start <= later < end
    ]


def main(
    url: Annotated[str, typer.Argument(help="The server, without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="Empty: the first that the server lists.")] = "",
    streams: Annotated[int, typer.Option(help="Streams that run when the prompt comes.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 8000,
) -> None:
    """Measure a running server."""
    model = model or httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    running, long = asyncio.run(measure(url, model, streams, prompt_tokens))
    table = Table(
        "", "chunks", "p50 ms", "p99 ms", "worst ms", title=f"{streams} streams, {prompt_tokens} tokens arrive"
    )
    figures: dict[str, float] = {"prefill_seconds": long.time_to_first_token}
    sent, answered = long.started, long.arrivals[0]
    for name, start, end in (("alone", sent - ALONE_SECONDS, sent), ("beside", sent, answered)):
        gaps = gaps_between(running, start, end)
        numbers = (percentile(gaps, 0.5), percentile(gaps, 0.99), max(gaps))
        table.add_row(name, str(len(gaps)), *(f"{number:.0f}" for number in numbers))
        figures |= {f"{name}_{what}_ms": n for what, n in zip(("p50", "p99", "worst"), numbers, strict=True)}
    Console(stderr=True).print(table)
    print(json.dumps({"command": sys.argv[1:], **figures}))


if __name__ == "__main__":
    typer.run(main)
