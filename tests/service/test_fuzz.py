"""Thousands of requests with any combination of parameters leave the service as it was: the same processes, nothing
leaked, and never an answer that blames the server.

A request that breaks a promise is shown with its seed and its body; either is enough to send it again alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis

from tests.service.fuzz_client import Tally, send_all
from tests.service.running import RunningService, wait_until
from tests.service.tiny_model import write_tiny_model
from tokenrelay.service.broker import MAX_CONNECTIONS
from tokenrelay.service.embedded_valkey import EmbeddedValkey
from tokenrelay.service.keys import Keys

MODEL = "tiny"
PROCESSES = ("api", "worker", "valkey-server")
ENDS = {"stop", "length", "tool_calls", "cancelled", "invalid_grammar", "deadline_exceeded"}  # nobody's failures
BUSY = {
    *("tokenrelay_requests_in_flight", "tokenrelay_num_requests_waiting", "tokenrelay_num_requests_running"),
    *("tokenrelay_engine_num_requests_waiting", "tokenrelay_kv_cache_usage_ratio"),
}
ALIVE = ("mailbox:", "worker:", "claim:", "usage:")  # keys of processes and of days, each with a TTL
HALF = 10_000
LEAK = 1024 * HALF  # bytes: what a kilobyte per request of one half would add


@pytest.fixture
def service(tmp_path: Path, smollm2_path: Path) -> Iterator[RunningService]:
    """A cache so small that requests are preempted, and logs that go away at once."""
    model = write_tiny_model(tmp_path / "tiny.gguf", tokenizer_from=smollm2_path)
    with RunningService(
        tmp_path, model=str(model), served_model_name=MODEL, kv_cache_mb=1, retention_seconds=1, log_level="warning"
    ) as running:
        yield running


def fuzz(service: RunningService, seeds: range) -> Tally:
    """Send the requests, and wait until the service has nothing left to do."""
    started = time.monotonic()
    tally = asyncio.run(send_all(service.url, MODEL, seeds))
    seconds = time.monotonic() - started
    print(f"{seeds}: {seconds:.1f} s, {len(seeds) / seconds:.0f} requests/s, {dict(tally.outcomes.most_common())}")
    wait_until(lambda: not any(service.metric(name) for name in BUSY), "nothing left to do")
    return tally


def pids(service: RunningService) -> list[int]:
    return [service.child(name).pid for name in PROCESSES]


def open_files(service: RunningService) -> int:
    return sum(service.child(name).num_fds() for name in PROCESSES)


def memory(service: RunningService, name: str) -> int:
    """Resident bytes, those of the process's own children included."""
    process = service.child(name)
    family: list[psutil.Process] = [process, *process.children(recursive=True)]
    used = sum(member.memory_info().rss for member in family)
    print(f"{name}: {used / 2**20:.1f} MB")
    return used


def assert_promises_kept(tally: Tally, num_requests: int) -> None:
    assert tally.faults == [], "\n".join(tally.faults[:10])
    assert tally.outcomes.total() == num_requests
    ran = sum(count for outcome, count in tally.outcomes.items() if outcome.startswith("200"))
    shortages = {outcome: count for outcome, count in tally.outcomes.items() if outcome.startswith("503")}
    shortages.pop("503 deadline_unreachable", 0)
    assert ran > num_requests / 2
    assert sum(shortages.values()) < num_requests / 100


def assert_accounts_balance(service: RunningService) -> None:
    """Every accepted request has ended once, and none because something of ours failed."""
    metrics = service.metrics()
    ended = {name: count for name, count in metrics.items() if name.startswith("tokenrelay_requests_total{")}
    assert sum(ended.values()) == service.metric("tokenrelay_requests_accepted_total")
    assert [name for name, count in ended.items() if count and not any(f'"{end}"' in name for end in ENDS)] == []


def assert_broker_is_empty(data_dir: Path) -> None:
    """Finished requests are forgotten; what stays is permanent or announces a living process."""
    keys = Keys(MODEL)
    of_processes = tuple(keys.prefix + kind for kind in ALIVE)
    with redis.Redis.from_url(EmbeddedValkey(data_dir, memory_mb=16).url, decode_responses=True) as broker:

        def passing() -> list[str]:
            return [key for key in broker.scan_iter(count=1000) if key not in keys.permanent]

        wait_until(lambda: all(key.startswith(of_processes) for key in passing()), "finished requests are forgotten")
        assert [key for key in passing() if broker.ttl(key) == -1] == []
        assert [broker.zcard(key) for key in (keys.waiting, keys.leases, keys.deadlines)] == [0, 0, 0]
        assert [broker.hlen(keys.sizes), broker.hlen(keys.load), broker.xlen(keys.dead)] == [0, 0, 0]


@pytest.mark.long
def test_hundreds_of_fuzzed_requests_leave_nothing_behind(service: RunningService, tmp_path: Path) -> None:
    processes, files = pids(service), open_files(service)
    tally = fuzz(service, range(300))
    assert_promises_kept(tally, 300)
    assert_accounts_balance(service)
    assert_broker_is_empty(tmp_path / "data")
    assert pids(service) == processes
    assert open_files(service) < files + 2 * MAX_CONNECTIONS  # kept after a burst; each has two ends
    assert "Traceback" not in service.log


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_twenty_thousand_fuzzed_requests_leave_nothing_behind(service: RunningService, tmp_path: Path) -> None:
    """What the first half has filled, caches and pools, the second fills no further."""
    processes = pids(service)
    first = fuzz(service, range(HALF))
    files, used = open_files(service), {name: memory(service, name) for name in ("api", "worker")}
    second = fuzz(service, range(HALF, 2 * HALF))
    for tally in (first, second):
        assert_promises_kept(tally, HALF)
    assert_accounts_balance(service)
    assert_broker_is_empty(tmp_path / "data")
    assert pids(service) == processes
    assert open_files(service) < files + 20
    assert {name: memory(service, name) < used[name] + LEAK for name in used} == {"api": True, "worker": True}
    assert "Traceback" not in service.log
