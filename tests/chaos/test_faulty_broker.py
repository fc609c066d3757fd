"""One command to the broker in a hundred fails, in one way or another, under API and worker: no request hangs, none is
wrong, and nothing is left of any of them."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import httpx
import pytest
from redis.asyncio import Redis

from tests.service.api.serving import Server, serving
from tests.service.faulty_broker import Dice, Fault, FaultyBroker
from tests.service.worker.working import Hand, working
from tokenrelay.service.api.served_model import ServedModel, load_served_model
from tokenrelay.service.broker import connect
from tokenrelay.service.embedded_valkey import EmbeddedValkey
from tokenrelay.service.keys import Keys
from tokenrelay.service.settings import Settings
from tokenrelay.service.worker.role import Role

MODEL = "counting"
PROBABILITY = 0.01
NUM_REQUESTS = 40  # per seed, eight at a time
MANY_SEEDS = 10  # for every kind of fault to come
NUM_TOKENS = 12
DEADLINE = 3.0  # seconds
MARGIN = 1.0  # behind it; a busy machine's own delay comes on top
EXPECTED = {"broker_unavailable", "deadline_exceeded", "deadline_unreachable", "no_worker", "cancelled"}


@dataclass
class Tally:
    """How requests ended, by error code or finish_reason; and what broke a promise."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    longest: float = 0.0
    delayed: float = 0.0  # what an idle timer was late by: this machine's doing


@dataclass(frozen=True)
class Site:
    server: Server
    hand: Hand
    redis: Redis  # without faults
    keys: Keys


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> ServedModel:
    return load_served_model(Settings(model=str(smollm2_path), served_model_name=MODEL, max_model_len=512))


@asynccontextmanager
async def site(valkey: EmbeddedValkey, folder: Path, model: ServedModel, dice: Dice) -> AsyncIterator[Site]:
    """API and worker behind a proxy that fails commands; it begins to when the site is ready."""
    broker, keys = Path(valkey.url.removeprefix("unix://")), Keys(MODEL)
    async with FaultyBroker(broker, folder / "faulty.sock", lambda: None) as proxy, connect(valkey.url) as redis:
        settings = Settings(redis_url=proxy.url, lease_seconds=2, drain_seconds=1, watchdog_seconds=0)
        async with (
            connect(proxy.url) as workers,
            serving_beside(settings, model) as server,
            working(workers, keys, settings, Role("worker")) as hand,
        ):
            proxy.fault = dice
            yield Site(server, hand, redis, keys)
            proxy.fault = lambda: None


@asynccontextmanager
async def serving_beside(settings: Settings, model: ServedModel) -> AsyncIterator[Server]:
    """Entered and left in a thread: its broker is a proxy in this one."""
    context = serving(settings, model)
    server = await asyncio.to_thread(context.__enter__)
    try:
        yield server
    finally:
        await asyncio.to_thread(context.__exit__, None, None, None)


async def ask(site: Site, http: httpx.AsyncClient, chance: random.Random, tally: Tally) -> None:
    """One request, streamed or not; some leave early."""
    body = {"model": MODEL, "prompt": "Once", "max_tokens": NUM_TOKENS, "ignore_eos": True, "timeout": DEADLINE}
    stream, leaves = chance.random() < 0.6, chance.random() < 0.2
    started, outcome = time.monotonic(), "left"
    with anyio.move_on_after(chance.uniform(0.0, 0.2) if leaves else None):
        try:
            response = await http.post("/v1/completions", json=body | {"stream": stream})
            outcome = judge(response, stream)
        except (httpx.TransportError, AssertionError, LookupError, ValueError) as error:
            tally.faults.append(f"{error!r}")
    tally.longest = max(tally.longest, time.monotonic() - started)
    tally.outcomes[outcome] += 1


def judge(response: httpx.Response, stream: bool) -> str:
    """How it ended; fails if that is none of the ends a request may have, or its text is not the undisturbed one."""
    if response.status_code != 200:
        code = response.json()["error"]["code"]
        assert code in EXPECTED, response.text
        return str(code)
    if not stream:
        assert response.json()["choices"][0]["text"] == "x" * NUM_TOKENS
        return "whole"
    *chunks, done = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert done == "[DONE]"
    events = [json.loads(chunk) for chunk in chunks]
    text = "".join(choice["text"] for event in events for choice in event.get("choices", ()))
    errors = [event["error"]["code"] for event in events if "error" in event]
    assert text == "x" * (len(text) if errors else NUM_TOKENS)
    assert set(errors) <= EXPECTED, errors
    return f"stream {errors[0]}" if errors else "stream whole"


async def watch_machine(tally: Tally) -> None:
    while True:
        before = time.monotonic()
        await asyncio.sleep(0.01)
        tally.delayed = max(tally.delayed, time.monotonic() - before - 0.01)


async def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)


async def assert_nothing_is_left(site: Site, tasks: int) -> None:
    generations, labels = site.server.process.generations, {"model_name": MODEL}
    metrics = site.server.metrics
    await until(lambda: not generations._background, "requests left by their clients are seen off")
    await until(lambda: not site.hand.held, "the worker holds nothing")
    assert metrics.get_sample_value("tokenrelay_requests_in_flight", labels) == 0
    assert (generations._num_readers, generations._mailbox._subscriptions) == (Counter(), {})
    await until(lambda: site.server.num_tasks() <= tasks, "no task of the API is left")
    keys = site.keys
    lengths = [await site.redis.zcard(key) for key in (keys.waiting, keys.leases, keys.deadlines)]
    lengths += [await site.redis.hlen(key) for key in (keys.sizes, keys.load)]
    assert lengths == [0] * 5
    everlasting = [key.decode() async for key in site.redis.scan_iter() if await site.redis.ttl(key) == -1]
    assert [key for key in everlasting if key not in keys.permanent] == []


async def run(valkey: EmbeddedValkey, folder: Path, model: ServedModel, seed: int) -> tuple[Tally, Dice]:
    tally, dice, chance = Tally(), Dice(seed, PROBABILITY), random.Random(seed)
    async with site(valkey, folder, model, dice) as place:
        tasks = place.server.num_tasks()
        limits = httpx.Limits(max_connections=8)
        watching = asyncio.create_task(watch_machine(tally))
        async with httpx.AsyncClient(base_url=place.server.base_url, timeout=60, limits=limits) as http:

            async def client() -> None:
                for _ in range(NUM_REQUESTS // 8):
                    await ask(place, http, chance, tally)

            await asyncio.gather(*(client() for _ in range(8)))
        watching.cancel()
        await assert_nothing_is_left(place, tasks)
    return tally, dice


async def check(valkey: EmbeddedValkey, folder: Path, model: ServedModel, seeds: range, patience: float) -> None:
    outcomes, thrown, longest = Counter[str](), Counter[str](), 0.0
    for seed in seeds:
        tally, dice = await run(valkey, folder, model, seed)
        assert tally.faults == [], f"seed {seed}: {tally.faults}"
        assert tally.longest < DEADLINE + patience + tally.delayed, f"seed {seed}: {tally}"
        outcomes += tally.outcomes
        thrown += Counter(fault.name for fault in dice.thrown.elements())
        longest = max(longest, tally.longest)
    print(f"{seeds}: {dict(outcomes)}; faults {dict(thrown)}; the longest took {longest:.2f} s")
    assert outcomes.total() == NUM_REQUESTS * len(seeds)
    assert outcomes["whole"] + outcomes["stream whole"] > outcomes.total() / 2
    assert len(thrown) == len(Fault) or len(seeds) < MANY_SEEDS


async def test_no_request_hangs_on_a_faulty_broker(valkey: EmbeddedValkey, tmp_path: Path, model: ServedModel) -> None:
    await check(valkey, tmp_path, model, range(2), patience=5 * MARGIN)


@pytest.mark.long
@pytest.mark.timeout(1800)
async def test_no_request_hangs_with_any_of_fifty_seeds(
    valkey: EmbeddedValkey, tmp_path: Path, model: ServedModel
) -> None:
    await check(valkey, tmp_path, model, range(50), patience=MARGIN)
