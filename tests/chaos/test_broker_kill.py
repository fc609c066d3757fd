"""The broker is killed: streams pause until it is back, new requests are refused, and none is lost or doubled."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import httpx
import pytest
from redis import Redis
from redis.exceptions import RedisError

from tests.chaos.conftest import EIGHT
from tests.chaos.pauses import percentile
from tests.chaos.streams import Recording, have_begun, mixed_requests, read_all, read_all_while
from tests.service.running import MODEL, RunningService, wait_until

NUM_STREAMS, NUM_TOKENS, NUM_KILLS = 32, 32, 12
NUM_REFUSALS = 3  # the broker stays away until so many new requests were refused


@dataclass
class Outage:
    """What happened to new requests while the broker was away, and when it was back (Unix time)."""

    back_at: float = 0.0
    refusals: list[float] = field(default_factory=list)  # seconds until each
    num_answered: int = 0

    def recovery(self, recordings: Sequence[Recording]) -> list[float]:
        """Seconds from its return to the next chunk of each stream that had more to say."""
        arrivals = (recording.first_arrival_after(self.back_at) for recording in recordings)
        return [arrival - self.back_at for arrival in arrivals if arrival]


def kill_broker(service: RunningService) -> Outage:
    """Kill it, and let it be started again when new requests have been refused for a while."""
    outage, answered = Outage(), Event()
    with without_supervisor(service), ThreadPoolExecutor(1) as pool:
        service.kill("valkey-server")
        asking = pool.submit(ask_until_answered, service, outage, answered)
        wait_until(lambda: asking.done() or len(outage.refusals) >= NUM_REFUSALS, "refusals")
        service.process.send_signal(signal.SIGCONT)
        with Redis.from_url(service.broker_url, socket_timeout=1) as redis:
            wait_until(lambda: is_back(redis), "the broker is back")
        outage.back_at = time.time()
        asking.result()
    return outage


@contextmanager
def without_supervisor(service: RunningService) -> Iterator[None]:
    """Nobody starts anything again meanwhile."""
    service.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        service.process.send_signal(signal.SIGCONT)


def is_back(redis: Redis) -> bool:
    try:
        return bool(redis.ping())
    except RedisError:
        return False


def ask_until_answered(service: RunningService, outage: Outage, answered: Event) -> None:
    body = {"model": MODEL, "prompt": "Now", "max_tokens": 1}
    with httpx.Client(base_url=service.url, timeout=60) as http:
        while not answered.is_set():
            asked_at = time.monotonic()
            response = http.post("/v1/completions", json=body)
            if response.status_code == 200:
                outage.num_answered += 1
                answered.set()
            else:
                assert response.status_code == 503
                assert response.json()["error"]["code"] == "broker_unavailable"
                assert int(response.headers["retry-after"]) >= 1
                outage.refusals.append(time.monotonic() - asked_at)


def test_every_stream_goes_on_when_the_broker_is_back(service: RunningService, undisturbed: list[Recording]) -> None:
    outages: list[Outage] = []

    def kill(recordings: Sequence[Recording]) -> None:
        wait_until(lambda: have_begun(recordings, 2), "all streams have begun")
        outages.append(kill_broker(service))

    accepted = service.metric("tokenrelay_requests_accepted_total")
    with httpx.Client(base_url=service.url, timeout=60) as http:
        disturbed = read_all_while(http, EIGHT, kill)
    for recording, expected in zip(disturbed, undisturbed, strict=True):
        recording.assert_whole()
        assert recording.choices == expected.choices
    [outage] = outages
    assert min(outage.refusals) < 1.0
    assert service.metric("tokenrelay_requests_accepted_total") - accepted == len(EIGHT) + outage.num_answered
    wait_until(lambda: service.metric("tokenrelay_requests_in_flight") == 0, "no request is left over")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_twelve_kills(tmp_path: Path, smollm2_path: Path) -> None:
    seeded, bodies = random.Random(2), mixed_requests(NUM_STREAMS, NUM_TOKENS)
    num_same, refusals, recoveries, epochs = 0, list[float](), list[float](), list[int]()
    with RunningService(tmp_path) as service, httpx.Client(base_url=service.url, timeout=120) as http:
        undisturbed = read_all(http, bodies)
        length = sum(recording.num_chunks for recording in undisturbed)
        for share in (seeded.uniform(0, 0.9) for _ in range(NUM_KILLS)):
            outages: list[Outage] = []

            def kill(recordings: Sequence[Recording]) -> None:
                wait_until(lambda: sum(r.num_chunks for r in recordings) >= share * length, "the point", 120)  # noqa: B023
                outages.append(kill_broker(service))  # noqa: B023

            recordings = read_all_while(http, bodies, kill)
            for recording, expected in zip(recordings, undisturbed, strict=True):
                recording.assert_whole()
                num_same += recording.is_that_of(expected)
                epochs.append(http.get(f"/v1/requests/{recording.request_id}").json()["epoch"])
            refusals += outages[0].refusals
            recoveries += outages[0].recovery(recordings)
        wait_until(lambda: service.metric("tokenrelay_requests_in_flight") == 0, "no request is left over")
    print(f"\n{NUM_KILLS} kills of the broker under {NUM_STREAMS} streams; seconds")
    print(f"  identical to the undisturbed run: {num_same} of {len(epochs)}")
    print(f"  computed by another worker meanwhile: {sum(epoch > 1 for epoch in epochs)}")
    for name, values in (("first chunk after its return", recoveries), ("refusal of a new request", refusals)):
        print(f"  {name}: p50 {percentile(values, 50):.2f}, p99 {percentile(values, 99):.2f}, worst {max(values):.2f}")
    assert num_same == len(epochs) == NUM_KILLS * NUM_STREAMS
    assert max(refusals) < 1.0
    assert percentile(recoveries, 99) <= 2.0
