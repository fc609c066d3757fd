"""What the supervisor does about processes that die, hang or are to be renewed: clients see a pause at most."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import psutil
import pytest

from tests.service.running import MODEL, RunningService, wait_until

PROMPT = "The history of bread begins"
NUM_TOKENS = 400
THINKING_SECONDS = 0.3


class Timed(NamedTuple):
    text: str
    longest_pause: float  # seconds


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[RunningService]:
    """With a spare worker."""
    options: dict[str, Any] = {"model": str(tiny_model), "served_model_name": MODEL, "kv_cache_mb": 64}
    with RunningService(tmp_path_factory.mktemp("service"), spare_workers=1, **options) as running:
        wait_until(lambda: running.log.count('"worker ready"') == 2, "both workers are ready", 60)
        yield running


def stream(
    client: openai.OpenAI, seed: int, begun: threading.Barrier | None = None, num_tokens: int = NUM_TOKENS
) -> Timed:
    """One request. ``begun`` is met when its first tokens are there."""
    chunks = client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=num_tokens,
        seed=seed,
        temperature=seed % 2,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    text, pause, last = "", 0.0, time.monotonic()
    finish_reasons = []
    for i, chunk in enumerate(chunks):
        now = time.monotonic()
        pause, last = max(pause, now - last), now
        text += chunk.choices[0].text
        finish_reasons.append(chunk.choices[0].finish_reason)
        if begun and i == 8:
            begun.wait(30)
    assert [reason for reason in finish_reasons if reason] == ["length"]
    return Timed(text, pause)


def ready(service: RunningService) -> bool:
    return httpx.get(f"{service.url}/readyz", timeout=5).status_code == 200


def test_a_stopped_worker_is_noticed_within_two_seconds(service: RunningService) -> None:
    """Of both workers nothing is heard; the API itself is well."""
    workers = [*service.children("worker"), *service.children("spare")]
    assert len(workers) == 2
    for worker in workers:
        worker.suspend()
    try:
        stopped_at = time.monotonic()
        wait_until(lambda: not ready(service), "not ready", 5)
        assert time.monotonic() - stopped_at < 2.0
        assert httpx.get(f"{service.url}/livez").status_code == 200
    finally:
        for worker in workers:
            worker.resume()
    wait_until(lambda: ready(service), "ready again", 5)


def test_a_spare_worker_takes_over_within_two_seconds(service: RunningService) -> None:
    client = service.client()
    with ThreadPoolExecutor(8) as pool:
        undisturbed = list(pool.map(lambda seed: stream(client, seed).text, range(8)))
        begun = threading.Barrier(9)
        streams = [pool.submit(stream, client, seed, begun) for seed in range(8)]
        begun.wait(30)
        os.kill(service.child("worker").pid, signal.SIGKILL)
        disturbed = [future.result() for future in streams]
    assert [timed.text for timed in disturbed] == undisturbed
    assert max(timed.longest_pause for timed in disturbed) < 2.0
    wait_until(lambda: len(service.children("worker")) == 1, "the worker is replaced")


def test_a_rolling_restart_fails_no_request(service: RunningService) -> None:
    roll(service, rounds=1)


def roll(service: RunningService, rounds: int) -> None:
    """Sixteen clients ask on and on, on connections that they keep, while every process is replaced."""
    wait_until(lambda: ready(service) and service.children("worker"), "ready")
    expected = {seed: stream(service.client(), seed, num_tokens=100).text for seed in range(16)}
    stop = threading.Event()

    def ask(seed: int) -> int:
        client, count = service.client(), 0
        while not stop.is_set():
            assert stream(client, seed, num_tokens=100).text == expected[seed]
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
def test_three_rolling_restarts_of_many_processes(tmp_path: Path, tiny_model: Path) -> None:
    options: dict[str, Any] = {"model": str(tiny_model), "served_model_name": MODEL, "kv_cache_mb": 64}
    with RunningService(tmp_path, workers=2, api_workers=3, spare_workers=1, **options) as service:
        wait_until(lambda: service.log.count('"worker ready"') == 3, "all workers are ready", 90)
        roll(service, rounds=3)
        accepted = service.metric("tokenrelay_requests_accepted_total")
        assert service.metric("tokenrelay_requests_total") == accepted  # of nine processes together
        assert service.metric("tokenrelay_requests_in_flight") == 0


@pytest.mark.long
def test_the_service_ends_with_1_when_a_worker_never_comes_up(tmp_path: Path, tiny_model: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(tiny_model.read_bytes())
    with RunningService(tmp_path, model=str(model), served_model_name=MODEL, kv_cache_mb=64) as service:
        children = psutil.Process(service.process.pid).children(recursive=True)
        model.write_bytes(b"not a model")
        service.kill("worker")
        assert service.process.wait(60) == 1
        assert not any(child.is_running() and child.status() != "zombie" for child in children)
