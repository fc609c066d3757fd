"""A worker of two processes: it writes what one would; when one is killed both end, and streams go on at the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.chaos.streams import Recording, have_begun, mixed_requests, read_all, read_all_while
from tests.model.generation import generate
from tests.service.running import RunningService, wait_until
from tokenrelay.model.engine.engine import Engine
from tokenrelay.model.engine.request import Request
from tokenrelay.model.sampling_params import SamplingParams

REQUESTS = mixed_requests(4, 80)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny: dict[str, Any]) -> Iterator[RunningService]:
    with RunningService(tmp_path_factory.mktemp("ranks"), tensor_parallel_size=2, dtype="float32", **tiny) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(service: RunningService) -> list[Recording]:
    with httpx.Client(base_url=service.url, timeout=60) as http:
        return read_all(http, REQUESTS)


def ranks(service: RunningService) -> list[psutil.Process]:
    """Of the one worker: itself, and who follows it."""
    worker = service.child("worker")
    return [worker, *(child for child in worker.children() if "--rank" in child.cmdline())]


def are_gone(processes: Sequence[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def test_two_processes_write_what_one_writes(service: RunningService, tiny_model: Path) -> None:
    prompts = [tuple(range(40, 40 + length)) for length in (3, 17, 90, 300)]
    params = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)
    whole = Engine.from_model(str(tiny_model), dtype="float32", device="cpu")
    expected = generate(whole, [Request(f"{len(prompt)}", prompt, params) for prompt in prompts])
    bodies = [{"prompt": prompt, "max_tokens": 64, "temperature": 0} for prompt in prompts]
    with httpx.Client(base_url=service.url, timeout=60) as http:
        found = read_all(http, bodies)
    assert [recording.choices[0].token_ids for recording in found] == list(expected.values())


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.long)], ids=["follower", "leader"])
def test_the_death_of_one_rank_ends_both_and_no_stream(
    service: RunningService, undisturbed: list[Recording], victim: int
) -> None:
    both = ranks(service)
    assert len(both) == 2

    def kill(recordings: Sequence[Recording]) -> None:
        wait_until(lambda: have_begun(recordings, 2), "all streams have begun")
        both[victim].kill()
        wait_until(lambda: are_gone(both), "the other rank has ended, too")

    with httpx.Client(base_url=service.url, timeout=60) as http:
        disturbed = read_all_while(http, REQUESTS, kill)
    for recording, expected in zip(disturbed, undisturbed, strict=True):
        recording.assert_whole()
        assert recording.choices == expected.choices
    assert service.metric("tokenrelay_requests_resumed_total") > 0
