"""Throughput and latencies of a running OpenAI-compatible server, over HTTP, streaming, closed loop.

Prompts are random token ids, so that no server's prefix cache helps unless ``--shared-prefix`` asks for it. The last
line is JSON. ``make bench BENCH="http://127.0.0.1:8000 --clients 16"``.
"""

from __future__ import annotations

import asyncio
import json
import platform
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table


@dataclass(slots=True)
class Measured:
    """One request, in seconds; ``arrivals`` are when each chunk with text came."""

    started: float
    arrivals: list[float] = field(default_factory=list)
    num_tokens: int = 0

    @property
    def time_to_first_token(self) -> float:
        return self.arrivals[0] - self.started

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Workload:
    """What each client sends."""

    model: str
    prompt_tokens: int
    output_tokens: int
    shared_prefix: int
    vocabulary: int = 40_000

    def body(self, rng: random.Random) -> dict[str, Any]:
        shared = random.Random(0).choices(range(1000, self.vocabulary), k=self.shared_prefix)
        own = rng.choices(range(1000, self.vocabulary), k=self.prompt_tokens)
        return {
            "model": self.model,
            "prompt": shared + own,
            "max_tokens": self.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


async def one_request(url: str, body: dict[str, Any]) -> Measured:
    """Over a connection of its own, as many clients do."""
    async with httpx.AsyncClient(timeout=600) as client:
        measured = Measured(time.perf_counter())
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise SystemExit(f"{response.status_code}: {(await response.aread()).decode()}")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    note(measured, json.loads(line[6:]))
    return measured


def note(measured: Measured, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        raise SystemExit(f"the stream ended with an error: {chunk['error']}")
    if chunk.get("choices"):
        measured.arrivals.append(time.perf_counter())
    if chunk.get("usage"):
        measured.num_tokens = chunk["usage"]["completion_tokens"]


async def closed_loop(url: str, workload: Workload, clients: int, requests: int) -> tuple[list[Measured], float]:
    """Each client sends its next request when its last has ended; returns the requests and the seconds taken."""
    rng = random.Random()  # new prompts every time, or a second run would meet its own prefixes
    bodies = iter([workload.body(rng) for _ in range(requests)])
    results: list[Measured] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"{clients} clients", total=requests)

        async def client() -> None:
            for body in bodies:
                results.append(await one_request(url, body))
                progress.advance(task)

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
    return results, time.perf_counter() - started


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def report(results: list[Measured], seconds: float) -> dict[str, float]:
    first = [result.time_to_first_token for result in results]
    gaps = [gap for result in results for gap in result.gaps]
    return {
        "output_tokens_per_second": sum(result.num_tokens for result in results) / seconds,
        "requests_per_second": len(results) / seconds,
        "time_to_first_token_p50_ms": statistics.median(first) * 1e3,
        "time_to_first_token_p99_ms": percentile(first, 0.99) * 1e3,
        "inter_token_p50_ms": statistics.median(gaps) * 1e3,
        "inter_token_p99_ms": percentile(gaps, 0.99) * 1e3,
    }


def main(
    url: Annotated[str, typer.Argument(help="The server, without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="Empty: the first that the server lists.")] = "",
    clients: Annotated[int, typer.Option(help="Requests in flight at any time.")] = 16,
    requests: Annotated[int, typer.Option(help="Requests in all; 0: four per client.")] = 0,
    prompt_tokens: int = 128,
    output_tokens: int = 64,
    shared_prefix: Annotated[int, typer.Option(help="Tokens that all prompts begin with.")] = 0,
) -> None:
    """Measure a running server; one warm-up request per client goes first."""
    model = model or httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    workload = Workload(model, prompt_tokens, output_tokens, shared_prefix)
    asyncio.run(closed_loop(url, workload, clients, clients))
    results, seconds = asyncio.run(closed_loop(url, workload, clients, requests or 4 * clients))
    figures = report(results, seconds)
    table = Table("measure", "value", title=f"{model}: {clients} clients, {prompt_tokens}/{output_tokens} tokens")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:.1f}")
    Console(stderr=True).print(table)
    print(json.dumps({"command": sys.argv[1:], "machine": platform.processor() or platform.machine(), **figures}))


if __name__ == "__main__":
    typer.run(main)
