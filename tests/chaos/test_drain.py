"""SIGTERM: running streams finish, or are handed to whoever comes next; nothing is cut off without a word."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.chaos.streams import Body, Recording, have_begun, read_all, read_all_while, read_rest
from tests.service.running import RunningService, wait_until

DRAIN_SECONDS, GRACE_SECONDS = 20, 2
NUM_STREAMS = 10


BODIES: list[Body] = [
    {"prompt": "Once", "max_tokens": 400, "temperature": i % 2, "seed": i} for i in range(NUM_STREAMS)
]


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def status_of_new_request(service: RunningService) -> int | None:
    """None: nobody listens any more."""
    try:
        body = {"prompt": "Once", "max_tokens": 1}
        return httpx.post(f"{service.url}/v1/completions", json=body, timeout=60).status_code
    except httpx.TransportError:
        return None


def same(recordings: Sequence[Recording], undisturbed: Sequence[Recording]) -> bool:
    for recording in recordings:
        recording.assert_whole()
    return [recording.choices for recording in recordings] == [recording.choices for recording in undisturbed]


def test_running_streams_finish_and_new_requests_are_refused(tmp_path: Path, tiny: dict[str, Any]) -> None:
    with RunningService(tmp_path, drain_seconds=DRAIN_SECONDS, **tiny) as service:
        children = psutil.Process(service.process.pid).children(recursive=True)
        with httpx.Client(base_url=service.url, timeout=60) as http:
            undisturbed = read_all(http, BODIES)
            started: list[float] = []

            def terminate(recordings: Sequence[Recording]) -> None:
                wait_until(lambda: have_begun(recordings, 4), "all streams have begun")
                service.process.terminate()
                started.append(time.monotonic())
                wait_until(lambda: status_of_new_request(service) in (503, None), "new requests are refused")
                assert not all(recording.done for recording in recordings)

            recordings = read_all_while(http, BODIES, terminate)
        assert service.process.wait(DRAIN_SECONDS + GRACE_SECONDS) == 0
        assert time.monotonic() - started[0] < DRAIN_SECONDS + GRACE_SECONDS
    assert same(recordings, undisturbed)
    assert not any(is_alive(child) for child in children)


@pytest.mark.long
def test_what_is_not_done_in_time_is_handed_over(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """From one worker to the next, unnoticed by clients; to the service's next start, which they are told of."""
    with RunningService(tmp_path, drain_seconds=0, **tiny) as service:
        with httpx.Client(base_url=service.url, timeout=60) as http:
            undisturbed = read_all(http, BODIES)
            drained = read_all_while(http, BODIES, lambda recordings: terminate(service.child("worker"), recordings))
            assert same(drained, undisturbed)
            wait_until(lambda: service.log.count('"worker ready"') == 2, "the next worker")
            recordings = read_all_while(http, BODIES, lambda recordings: terminate(service.process, recordings))
        assert service.process.wait(GRACE_SECONDS + 10) == 0
        handed_back = [int(number) for number in re.findall(r'"handed_back": (\d+)', service.log)]
        assert len(handed_back) == 2
        assert min(handed_back) > 0
    interrupted = [recording for recording in recordings if recording.error]
    assert interrupted
    for recording in interrupted:
        assert recording.done
        assert recording.error["code"] == "unavailable"
        recording.done, recording.error = False, {}
    with (
        RunningService(tmp_path, **tiny) as service,
        httpx.Client(base_url=service.url, timeout=60) as http,
        ThreadPoolExecutor(NUM_STREAMS) as pool,
    ):
        list(pool.map(lambda recording: read_rest(http, recording), interrupted))
    assert same(recordings, undisturbed)


def terminate(process: psutil.Process | subprocess.Popen[bytes], recordings: Sequence[Recording]) -> None:
    """In the middle of them all."""
    wait_until(lambda: have_begun(recordings, 4), "all streams have begun")
    process.terminate()


def test_nothing_outlives_the_supervisor(tmp_path: Path, tiny: dict[str, Any]) -> None:
    with RunningService(tmp_path, **tiny) as service:
        children = psutil.Process(service.process.pid).children(recursive=True)
        assert len(children) == 3
        os.kill(service.process.pid, signal.SIGKILL)
        wait_until(lambda: not any(is_alive(child) for child in children), "all gone")
