"""Requests that end, that are cancelled anywhere on their way and that are refused leave nothing behind: blocks, files,
keys and memory are what they were."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from tests.service.running import RunningService, wait_until
from tests.service.test_fuzz import BUSY, MODEL, assert_broker_is_empty, memory, open_files, pids

CANCELLED, WRONG = 0.30, 0.05  # shares of the requests
CONNECTIONS = 16
MEASURED = ("api", "worker")
WARMING = 2000  # requests until caches and pools are full
SLOPE = 1 << 20  # bytes per thousand requests
WRONG_FIELDS = ({"max_tokens": -1}, {"model": "another"}, {"temperature": "hot"}, {"no_such_field": 1})
TEXTS = ("Once upon a time", "The sun rises in the east and", "def fibonacci(n):", "a b c d e f g " * 8)


@pytest.fixture
def service(tmp_path: Path, tiny: dict[str, Any]) -> Iterator[RunningService]:
    """A small cache, and finished requests are forgotten at once."""
    options = tiny | {"served_model_name": MODEL, "kv_cache_mb": 4, "retention_seconds": 1, "log_level": "warning"}
    with RunningService(tmp_path, **options) as running:
        yield running


def some_request(chance: random.Random) -> tuple[str, dict[str, object]]:
    """A route and a body that is answered, briefly or at length, by one choice or two."""
    options: dict[str, object] = {
        "max_tokens": chance.randint(1, 40),
        "stream": chance.random() < 0.6,
        "n": chance.choice((1, 1, 2)),
    }
    options |= {"ignore_eos": chance.random() < 0.5, "model": MODEL}
    if chance.random() < 0.5:
        return "/v1/completions", {"prompt": chance.choice(TEXTS), **options}
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": chance.choice(TEXTS)}], **options}


async def ask(http: httpx.AsyncClient, seed: int) -> str:
    """What became of the request of this seed."""
    chance = random.Random(seed)
    route, body = some_request(chance)
    fate = chance.random()
    if fate < WRONG:
        response = await http.post(route, json=body | chance.choice(WRONG_FIELDS))
        return f"refused {response.status_code // 100}xx"
    with anyio.move_on_after(chance.uniform(0.0, 0.15) if fate < WRONG + CANCELLED else None):
        response = await http.post(route, json=body)
        return f"ended {response.status_code}"
    return "cancelled"


async def ask_all(url: str, seeds: range) -> Counter[str]:
    outcomes, waiting = Counter[str](), iter(seeds)
    limits = httpx.Limits(max_connections=CONNECTIONS)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as http:

        async def client() -> None:
            for seed in waiting:
                outcomes[await ask(http, seed)] += 1

        await asyncio.gather(*(client() for _ in range(CONNECTIONS)))
    return outcomes


def send(service: RunningService, seeds: range) -> Counter[str]:
    """Until the service has nothing left to do: no request, no block in use."""
    started = time.monotonic()
    outcomes = asyncio.run(ask_all(service.url, seeds))
    print(f"{seeds}: {time.monotonic() - started:.1f} s, {dict(outcomes)}")
    wait_until(lambda: not any(service.metric(name) for name in BUSY), "nothing left to do")
    return outcomes


def assert_as_meant(outcomes: Counter[str]) -> None:
    total = outcomes.total()
    assert set(outcomes) == {"ended 200", "cancelled", "refused 4xx"}, outcomes
    assert outcomes["cancelled"] > CANCELLED / 3 * total  # some had ended before
    assert 0 < outcomes["refused 4xx"] < 2 * WRONG * total


def test_mixed_requests_leave_nothing_behind(service: RunningService, tmp_path: Path) -> None:
    send(service, range(40))
    processes, files = pids(service), open_files(service)
    assert_as_meant(send(service, range(40, 240)))
    assert_broker_is_empty(tmp_path / "data")
    wait_until(lambda: open_files(service) <= files, "every file and connection is closed")
    assert pids(service) == processes
    assert "Traceback" not in service.log


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_ten_thousand_mixed_requests_leave_nothing_behind(service: RunningService, tmp_path: Path) -> None:
    """The first thousands fill caches and pools; then memory is a line, and its slope a leak."""
    send(service, range(WARMING))
    processes, files = pids(service), open_files(service)
    used: dict[str, list[int]] = {name: [] for name in MEASURED}
    outcomes = Counter[str]()
    for thousand in range(10):
        first = WARMING + 1000 * thousand
        outcomes += send(service, range(first, first + 1000))
        for name in MEASURED:
            used[name].append(memory(service, name))
    assert_as_meant(outcomes)
    assert_broker_is_empty(tmp_path / "data")
    wait_until(lambda: open_files(service) <= files, "every file and connection is closed")
    slopes = {name: statistics.linear_regression(range(10), sizes).slope for name, sizes in used.items()}
    print({name: f"{slope / 1024:.0f} KB per 1,000 requests" for name, slope in slopes.items()})
    assert max(slopes.values()) < SLOPE
    assert pids(service) == processes
    assert "Traceback" not in service.log
