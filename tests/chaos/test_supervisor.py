"""What the supervisor does about processes that die, hang or are to be renewed: clients see a pause at most."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.chaos.streams import Body, Recording, have_begun, read, read_all, read_all_while
from tests.service.running import TWO_SECONDS, RunningService, wait_until

THINKING_SECONDS = 0.3


def body(seed: int, num_tokens: int) -> Body:
    """Greedy and seeded by turns."""
    prompt = "The history of bread begins"
    return {"prompt": prompt, "max_tokens": num_tokens, "seed": seed, "temperature": seed % 2}


def ready(service: RunningService) -> bool:
    return httpx.get(f"{service.url}/readyz", timeout=60).status_code == 200


def test_a_stopped_worker_is_noticed_within_two_seconds(tiny_service: RunningService) -> None:
    """Of both workers nothing is heard; the API itself is well."""
    workers = [*tiny_service.children("worker"), *tiny_service.children("spare")]
    assert len(workers) == 2
    for worker in workers:
        worker.suspend()
    try:
        stopped_at = time.monotonic()
        wait_until(lambda: not ready(tiny_service), "not ready")
        assert time.monotonic() - stopped_at < TWO_SECONDS
        assert httpx.get(f"{tiny_service.url}/livez", timeout=60).status_code == 200
    finally:
        for worker in workers:
            worker.resume()
    wait_until(lambda: ready(tiny_service), "ready again")


def test_a_spare_worker_takes_over_within_two_seconds(tiny_service: RunningService) -> None:
    bodies = [body(seed, 400) for seed in range(8)]

    def kill(recordings: Sequence[Recording]) -> None:
        wait_until(lambda: have_begun(recordings, 8), "all streams have begun")
        tiny_service.kill("worker")

    with httpx.Client(base_url=tiny_service.url, timeout=60) as http:
        undisturbed = read_all(http, bodies)
        disturbed = read_all_while(http, bodies, kill)
    for recording, expected in zip(disturbed, undisturbed, strict=True):
        recording.assert_whole()
        assert recording.choices == expected.choices
    assert max(recording.longest_pause for recording in disturbed) < TWO_SECONDS
    wait_until(lambda: len(tiny_service.children("worker")) == 1, "the worker is replaced")


def test_a_rolling_restart_fails_no_request(tiny_service: RunningService) -> None:
    roll(tiny_service, rounds=1)


def roll(service: RunningService, rounds: int) -> None:
    """Sixteen clients ask on and on, on connections that they keep, while every process is replaced."""
    wait_until(lambda: ready(service) and service.children("worker"), "ready")
    with httpx.Client(base_url=service.url, timeout=60) as http:
        expected = [recording.choices for recording in read_all(http, [body(seed, 100) for seed in range(16)])]
    stop = threading.Event()

    def ask(seed: int) -> int:
        count = 0
        with httpx.Client(base_url=service.url, timeout=60) as http:
            while not stop.is_set():
                recording = read(http, body(seed, 100))
                recording.assert_whole()
                assert recording.choices == expected[seed]
                count += 1
                stop.wait(THINKING_SECONDS)
        return count

    with ThreadPoolExecutor(16) as pool:
        clients = [pool.submit(ask, seed) for seed in range(16)]
        try:
            for number in range(rounds):
                before = pids(service)
                restarted = service.log.count("restarted everything")
                service.process.send_signal(signal.SIGHUP)
                wait_until(lambda: service.log.count("restarted everything") > restarted, f"round {number}", 110)  # noqa: B023
                assert pids(service) & before == set()
        finally:
            stop.set()
        assert all(client.result() > 0 for client in clients)


def pids(service: RunningService) -> set[int]:
    return {child.pid for name in ("api", "worker", "spare") for child in service.children(name)}


@pytest.mark.long
def test_three_rolling_restarts_of_many_processes(tmp_path: Path, tiny: dict[str, Any]) -> None:
    with RunningService(tmp_path, workers=2, api_workers=3, spare_workers=1, **tiny) as service:
        wait_until(lambda: service.log.count('"worker ready"') == 3, "all workers are ready", 90)
        roll(service, rounds=3)
        accepted = service.metric("tokenrelay_requests_accepted_total")
        assert service.metric("tokenrelay_requests_total") == accepted  # of nine processes together
        assert service.metric("tokenrelay_requests_in_flight") == 0


@pytest.mark.long
def test_the_service_ends_with_1_when_a_worker_never_comes_up(tmp_path: Path, tiny: dict[str, Any]) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(Path(tiny["model"]).read_bytes())
    with RunningService(tmp_path, **tiny | {"model": str(model)}) as service:
        children = psutil.Process(service.process.pid).children(recursive=True)
        model.write_bytes(b"not a model")
        service.kill("worker")
        assert service.process.wait(60) == 1
        assert not any(child.is_running() and child.status() != "zombie" for child in children)
