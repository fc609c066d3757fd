"""Who falls silent loses its requests, and may not write to them when it wakes; who is only slow keeps them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.chaos.streams import PROMPTS, Body, Recording, have_begun, read_all, read_all_while
from tests.service.relay import submission
from tests.service.running import RunningService, wait_until
from tests.service.worker.working import Counting, working
from tokenrelay.model.engine.request import Request
from tokenrelay.service.broker import connect
from tokenrelay.service.embedded_valkey import EmbeddedValkey
from tokenrelay.service.keys import Keys
from tokenrelay.service.queue import Queue
from tokenrelay.service.settings import Settings
from tokenrelay.service.worker.role import Role

LEASE = 1.0  # seconds
STALL = 3 * LEASE
BODIES: list[Body] = [
    {"prompt": prompt, "max_tokens": 400, "temperature": i % 2, "seed": i} for i, prompt in enumerate(PROMPTS)
]


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory, tiny: dict[str, Any]) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("service")
    with RunningService(folder, workers=2, lease_seconds=LEASE, **tiny) as service:
        wait_until(lambda: service.log.count('"worker ready"') == 2, "both workers are ready", 60)
        yield service


def test_a_stopped_worker_is_fenced_when_it_wakes(two_workers: RunningService) -> None:
    stop_and_wake(two_workers, rounds=1)


@pytest.mark.long
def test_ten_times(two_workers: RunningService) -> None:
    refused = stop_and_wake(two_workers, rounds=10)
    print(f"\n10 workers stopped for {STALL} s under {len(BODIES)} streams: {refused:.0f} writes refused")


def stop_and_wake(service: RunningService, rounds: int) -> float:
    """Returns how many writes were refused in all."""
    with httpx.Client(base_url=service.url, timeout=60) as http:
        undisturbed = read_all(http, BODIES)
        before = refused = service.metric("tokenrelay_fenced_writes_total")
        for number in range(rounds):
            victim = service.children("worker")[number % 2]
            for recording, expected in zip(read_while_stopped(http, victim), undisturbed, strict=True):
                recording.assert_whole()
                assert recording.choices == expected.choices
            wait_until(lambda: service.metric("tokenrelay_fenced_writes_total") > refused, "its writes are refused")  # noqa: B023
            refused = service.metric("tokenrelay_fenced_writes_total")
    return refused - before


def read_while_stopped(http: httpx.Client, victim: psutil.Process) -> list[Recording]:
    """All streams end without it, those too that it was at."""

    def stop(recordings: Sequence[Recording]) -> None:
        wait_until(lambda: have_begun(recordings, 4), "all streams have begun")
        stopped_at = time.monotonic()
        victim.suspend()
        try:
            wait_until(lambda: time.monotonic() > stopped_at + STALL, "three leases are over")
            wait_until(lambda: all(recording.done for recording in recordings), "all streams have ended", 60)
        finally:
            victim.resume()

    return read_all_while(http, BODIES, stop)


# --- slow is not dead -------------------------------------------------------------------------------------------------


class Slow(Counting):
    """Computes the first token for longer than a lease, and does not let go of the interpreter more than it must."""

    def __init__(self) -> None:
        super().__init__()
        self.busy = threading.Event()

    def next_id(self, request: Request) -> int:
        if not request.num_output_tokens:
            self.busy.set()
            until = time.monotonic() + STALL
            while time.monotonic() < until:
                pass
        return super().next_id(request)


async def test_a_slow_prompt_is_not_given_to_another_worker(tmp_path: Path) -> None:
    """Though one is there that looks for expired leases."""
    broker, network = EmbeddedValkey(tmp_path, memory_mb=32), Slow()
    settings, keys = Settings(redis_url=broker.start(), lease_seconds=2 * LEASE, watchdog_seconds=0), Keys("slow")
    try:
        async with connect(broker.url) as redis, working(redis, keys, settings, Role("slow"), network) as slow:
            await Queue(redis, keys, settings).submit(submission("long", max_tokens=4), mailbox="api")
            assert await asyncio.to_thread(network.busy.wait, 60)
            async with working(redis, keys, settings, Role("idle")) as idle:
                while slow.held:
                    assert not idle.held
                    await asyncio.sleep(0)
            kept: Any = await redis.hmget(keys.request("long"), "state", "epoch", "attempts")
            assert kept == [b"finished", b"1", b"1"]
    finally:
        broker.stop()


@pytest.mark.long
def test_a_prompt_of_thousands_of_tokens_with_a_lease_of_a_second(tmp_path: Path, smollm2_path: Path) -> None:
    """The spare worker would take what is given up."""
    long_prompt: Body = {"prompt": "All work and no play makes Jack a dull boy. " * 640, "max_tokens": 4}
    short: list[Body] = [{"prompt": prompt, "max_tokens": 150} for prompt in PROMPTS]
    with (
        RunningService(tmp_path, spare_workers=1, lease_seconds=LEASE) as service,
        httpx.Client(base_url=service.url, timeout=200) as http,
    ):
        wait_until(lambda: service.log.count('"worker ready"') == 2, "both workers are ready", 60)
        started = time.time()
        recordings = read_all(http, [long_prompt, *short])
        statuses = [http.get(f"/v1/requests/{recording.request_id}").json() for recording in recordings]
        print(f"\nprompt of {statuses[0]['prompt_tokens']} tokens beside {len(short)} streams, lease {LEASE} s:")
        print(f"  first token after {recordings[0].arrivals[0] - started:.1f} s")
        assert recordings[0].arrivals[0] - started > 10 * LEASE
        for recording in recordings:
            recording.assert_whole()
        assert {(status["epoch"], status["attempts"]) for status in statuses} == {(1, 1)}
        assert service.metric("tokenrelay_requests_resumed_total") == 0
