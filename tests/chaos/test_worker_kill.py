"""A model worker is killed: its streams pause, and go on at another one, token for token."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from jsonschema import validate

from tests.chaos.conftest import EIGHT
from tests.chaos.pauses import Pause, pauses, percentile, report
from tests.chaos.streams import (
    PERSON,
    Body,
    Recording,
    have_begun,
    mixed_requests,
    read_all,
    read_all_while,
)
from tests.service.running import RunningService, wait_until

NUM_STREAMS, NUM_TOKENS = 32, 32


def test_every_stream_goes_on_at_the_next_worker(service: RunningService, undisturbed: list[Recording]) -> None:
    """Greedy, seeded, several choices, log probabilities, stop strings, a schema."""

    killed_at = 0.0

    def kill(recordings: Sequence[Recording]) -> None:
        nonlocal killed_at
        wait_until(lambda: have_begun(recordings, 2), "all streams have begun")
        service.kill("worker")
        killed_at = time.time()

    with httpx.Client(base_url=service.url, timeout=60) as http:
        disturbed = read_all_while(http, EIGHT, kill)
        num_resumed = len(pauses(http, disturbed, killed_at))
    for recording, expected in zip(disturbed, undisturbed, strict=True):
        recording.assert_whole()
        assert recording.choices == expected.choices
    assert num_resumed  # some may have ended before
    assert service.metric("tokenrelay_requests_resumed_total") == num_resumed  # the killed one's are gone with it
    persons = json.loads(disturbed[7].text)
    assert persons
    for person in persons:
        validate(person, PERSON)


class Trial:
    """Kills a service's worker under 32 streams, again and again, each time at another point of their way."""

    def __init__(self, service: RunningService, http: httpx.Client, num_loaded: int) -> None:
        self.pauses: list[Pause] = []
        self.num_same = self.num_streams = 0
        self.load_seconds: list[float] = []
        self._service, self._http = service, http
        self._num_loaded = num_loaded  # workers that hold the model, now and again after every death
        self._num_ready = 0
        self._await_all_ready()
        self._bodies: list[Body] = mixed_requests(NUM_STREAMS, NUM_TOKENS)
        self._undisturbed = read_all(http, self._bodies)
        self._length = sum(recording.num_chunks for recording in self._undisturbed)

    def kill_at(self, share: float) -> None:
        """When this share of all chunks has come: at 0 all prompts are being computed."""
        killed_at = 0.0

        def kill(recordings: Sequence[Recording]) -> None:
            nonlocal killed_at
            wait_until(lambda: sum(r.num_chunks for r in recordings) >= share * self._length, "the point", 120)
            if share == 0:
                wait_until(lambda: self._service.metric("tokenrelay_num_requests_running") > 0, "claimed", 60)
            self._service.kill("worker")
            killed_at = time.time()
            self._await_all_ready()
            self.load_seconds.append(time.time() - killed_at)

        recordings = read_all_while(self._http, self._bodies, kill)
        for recording, expected in zip(recordings, self._undisturbed, strict=True):
            recording.assert_whole()
            self.num_same += recording.is_that_of(expected)
            self.num_streams += 1
        self.pauses += pauses(self._http, recordings, killed_at)

    def _await_all_ready(self) -> None:
        """Also the one that is started in place of the last victim."""
        expected = self._num_ready + 1 if self._num_ready else self._num_loaded
        wait_until(lambda: self._service.log.count('"worker ready"') >= expected, "the model is loaded", 120)
        self._num_ready = expected

    def report(self, title: str) -> None:
        report(title, self.pauses)
        print(f"  identical to the undisturbed run: {self.num_same} of {self.num_streams}")
        print(f"  until the next worker was loaded, worst: {max(self.load_seconds):.1f} s")


@contextmanager
def trial(folder: Path, spare_workers: int) -> Iterator[Trial]:
    """Without a prefix cache: rounds of the same requests would help each other."""
    with (
        RunningService(folder, spare_workers=spare_workers, enable_prefix_caching=False) as service,
        httpx.Client(base_url=service.url, timeout=120) as http,
    ):
        yield Trial(service, http, num_loaded=1 + spare_workers)


def random_points(number: int) -> list[float]:
    """Every fifth is the beginning; the last streams end soon after 0.9."""
    seeded = random.Random(1)
    return [seeded.uniform(0, 0.9) if i % 5 else 0.0 for i in range(number)]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_twenty_kills_with_a_spare_worker(tmp_path: Path, smollm2_path: Path) -> None:
    with trial(tmp_path, spare_workers=1) as trying:
        for share in random_points(20):
            trying.kill_at(share)
    trying.report("20 kills under 32 streams, with a spare worker")
    assert trying.num_same == trying.num_streams == 640
    assert percentile((pause.detection + pause.claim for pause in trying.pauses), 99) < 1.0  # the rest is computing
    assert percentile((pause.seen for pause in trying.pauses), 99) < min(trying.load_seconds)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_five_kills_without_a_spare_worker(tmp_path: Path, smollm2_path: Path) -> None:
    with trial(tmp_path, spare_workers=0) as trying:
        for share in random_points(5):
            trying.kill_at(share)
    trying.report("5 kills under 32 streams, without a spare worker")
    assert trying.num_same == trying.num_streams == 160
    assert percentile((pause.seen for pause in trying.pauses), 99) <= max(trying.load_seconds) + 2.0
