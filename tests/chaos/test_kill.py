"""Whichever process dies, an accepted request ends once, with the text of the undisturbed run. (short form)"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from tests.service.running import MODEL, RunningService, wait_until

PROMPTS = ["The history of bread begins", "In the deep forest there lived", "def fibonacci(n):", "Dear Sir or Madam,"]


@pytest.fixture
def service(tmp_path: Path, smollm2_path: Path) -> Iterator[RunningService]:
    with RunningService(tmp_path, lease_seconds=1.5, drain_seconds=20) as running:
        yield running


def generate(client: openai.OpenAI, index: int, num_tokens: int) -> Iterator[str]:
    """Stream one of eight requests: greedy and seeded."""
    stream = client.completions.create(
        model=MODEL,
        prompt=PROMPTS[index % 4],
        max_tokens=num_tokens,
        temperature=index // 4,
        seed=index,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    finished: list[str | None] = []
    for chunk in stream:
        finished.append(chunk.choices[0].finish_reason)
        yield chunk.choices[0].text
    assert finished[-1] == "length"
    assert finished.count("length") == 1


@pytest.mark.parametrize("victim", ["worker", "valkey-server"])
def test_no_stream_is_lost_or_changed(service: RunningService, victim: str) -> None:
    client = service.client()
    undisturbed = ["".join(generate(client, index, 48)) for index in range(8)]
    streams = [generate(client, index, 48) for index in range(8)]
    with ThreadPoolExecutor(8) as pool:
        begun = list(pool.map(lambda stream: [next(stream) for _ in range(6)], streams))
        service.kill(victim)
        rest: list[list[str]] = list(pool.map(list, streams))
    texts = ["".join(first + last) for first, last in zip(begun, rest, strict=True)]
    assert texts == undisturbed
    if victim == "worker":
        assert service.metric("tokenrelay_requests_resumed_total") == 8


def test_a_drained_worker_hands_its_streams_to_the_next(tmp_path: Path, smollm2_path: Path) -> None:
    with RunningService(tmp_path, drain_seconds=0) as service:
        client = service.client()
        undisturbed = ["".join(generate(client, index, 64)) for index in (0, 5)]
        drained = service.child("worker")
        streams = [generate(client, index, 64) for index in (0, 5)]
        begun = [[next(stream) for _ in range(4)] for stream in streams]
        drained.terminate()  # the supervisor starts the next
        rest = ["".join(stream) for stream in streams]
        assert ["".join(first) + last for first, last in zip(begun, rest, strict=True)] == undisturbed
        assert '"exit_code": 0' in service.log
        assert '"handed_back": 2' in service.log


def test_nothing_outlives_the_supervisor(service: RunningService) -> None:
    children = psutil.Process(service.process.pid).children(recursive=True)
    assert len(children) == 3
    os.kill(service.process.pid, signal.SIGKILL)
    wait_until(lambda: not any(child.is_running() and child.status() != "zombie" for child in children), "all gone", 5)


def test_sigterm_lets_running_streams_finish(service: RunningService) -> None:
    stream = generate(service.client(), 0, 64)
    first = next(stream)
    service.process.terminate()

    def refused() -> bool:
        try:
            return httpx.get(f"{service.url}/readyz").status_code == 503
        except httpx.TransportError:
            return True

    wait_until(refused, "not ready any more", 2)
    assert len(first + "".join(stream)) > 100
    assert service.process.wait(30) == 0
