"""A worker of two ranks, of which one is killed: the worker ends with it, and its streams go on at the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import psutil
import pytest

from tests.chaos.streams import Recording, have_begun, mixed_requests, read_all, read_all_while
from tests.service.running import RunningService, wait_until

REQUESTS = mixed_requests(4, 80)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny: dict[str, Any]) -> Iterator[RunningService]:
    with RunningService(tmp_path_factory.mktemp("ranks"), tensor_parallel_size=2, **tiny) as running:
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


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.long)], ids=["follower", "leader"])
def test_the_death_of_one_rank_ends_both_and_no_stream(
    service: RunningService, undisturbed: list[Recording], victim: int
) -> None:
    both = ranks(service)
    assert len(both) == 2

    def kill(recordings: Sequence[Recording]) -> None:
        wait_until(lambda: have_begun(recordings, 2), "all streams have begun")
        both[victim].kill()
        wait_until(lambda: are_gone(both), "the other rank has ended, too", 10)

    with httpx.Client(base_url=service.url, timeout=60) as http:
        disturbed = read_all_while(http, REQUESTS, kill)
    for recording, expected in zip(disturbed, undisturbed, strict=True):
        recording.assert_whole()
        assert recording.choices == expected.choices
    assert service.metric("tokenrelay_requests_resumed_total") > 0
