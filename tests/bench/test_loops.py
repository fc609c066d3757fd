"""A closed loop keeps so many requests in flight; an open one sends when it is time, whatever comes back."""

from __future__ import annotations

import asyncio
import random
import statistics
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bench.conftest import Say
from tests.service.api.conftest import in_flight
from tests.service.api.serving import Server, wait_for, working
from tokenrelay.bench.beside import beside, gaps_across, gaps_within
from tokenrelay.bench.client import Client
from tokenrelay.bench.figures import Bounds
from tokenrelay.bench.loops import closed_loop, open_loop
from tokenrelay.bench.measured import Measured, TargetError
from tokenrelay.bench.targets import Access
from tokenrelay.bench.targets import Server as Target
from tokenrelay.bench.workload import Workload

ANYTHING = Bounds()
SHORT = Workload(clients=3, prompt_tokens=16, output_tokens=4)


class InFlight:
    """Answers after a few turns of the loop, and knows how many waited at once."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.sent: list[bytes] = []

    async def send(self, body: bytes, measured: Measured) -> Measured:
        self.sent.append(body)
        self.now += 1
        self.most = max(self.most, self.now)
        for _ in range(random.Random(body).randrange(1, 9)):
            await asyncio.sleep(0)
        self.now -= 1
        return measured


def bodies(count: int) -> list[bytes]:
    return [b"%d" % i for i in range(count)]


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(0, 30))
def test_a_closed_loop_sends_each_once_and_never_more_at_a_time(clients: int, count: int) -> None:
    server = InFlight()
    run = asyncio.run(closed_loop(server.send, bodies(count), clients))
    assert server.sent == bodies(count)
    assert server.most == min(clients, count)
    assert len(run.requests) == count


async def test_an_open_loop_sends_though_nothing_comes_back() -> None:
    arrived, gate = list[Measured](), asyncio.Event()

    async def send(body: bytes, measured: Measured) -> Measured:
        arrived.append(measured)
        if len(arrived) == 20:
            gate.set()
        await gate.wait()
        return measured

    run = await open_loop(send, bodies(20), 500.0, random.Random(0))
    assert len(run.requests) == 20


async def test_arrivals_are_a_poisson_process() -> None:
    server = InFlight()
    run = await open_loop(server.send, bodies(1000), 5000.0, random.Random(1))
    due = sorted(request.started for request in run.requests)
    gaps = [later - earlier for earlier, later in pairwise(due)]
    assert statistics.mean(gaps) == pytest.approx(1 / 5000, rel=0.15)
    assert statistics.stdev(gaps) == pytest.approx(1 / 5000, rel=0.15)  # exponential: as large as the mean


async def measured(server: Server, workload: Workload, bounds: Bounds = ANYTHING) -> tuple[dict[str, float], int]:
    """The figures, and how many requests ended."""
    target, ended = Target("it", server.base_url, Access()), list[None]()
    await target.prepare()
    figures, _ = await target.measure(workload, bounds, lambda: ended.append(None))
    return figures, len(ended)


async def test_a_closed_loop_against_the_real_api(running_server: Server) -> None:
    async with working(running_server) as worker:
        figures, num_ended = await measured(running_server, SHORT)
    assert num_ended == figures["requests"] == 12
    assert len(worker.claims) == 15  # one per client to warm up
    assert figures["errors"] == figures["refused"] == 0
    assert figures["requests_per_second"] * 4 == pytest.approx(figures["output_tokens_per_second"])
    assert figures["prompt_tokens_per_second"] == pytest.approx(4 * figures["output_tokens_per_second"])
    assert 0 < figures["ttft_p50_ms"] <= figures["ttft_p99_ms"] <= figures["e2e_p99_ms"]
    assert figures["client_cpu_us_per_chunk"] > 0


async def test_an_open_loop_against_the_real_api(running_server: Server) -> None:
    async with working(running_server):
        figures, _ = await measured(running_server, Workload(rate=200, requests=30, output_tokens=3), Bounds(ttft_ms=0))
    assert figures["requests"] == 30
    assert figures["goodput_requests_per_second"] == 0  # nobody answers in no time


async def test_prompts_differ_but_for_what_they_share(running_server: Server) -> None:
    workload = Workload(clients=2, prompt_tokens=10, shared_prefix=20, output_tokens=2, vocabulary=5000)
    async with working(running_server) as worker:
        await measured(running_server, workload)
    prompts = [claim.submission.prompt_token_ids for claim in worker.claims]
    assert len({tuple(prompt[:20]) for prompt in prompts}) == 1
    assert len({tuple(prompt[20:]) for prompt in prompts}) == len(prompts)
    assert all(len(prompt) == 30 and max(prompt) < 5000 for prompt in prompts)


async def test_a_prompt_that_no_server_takes_is_its_message(running_server: Server) -> None:
    async with working(running_server):
        with pytest.raises(TargetError, match="400: "):
            await measured(running_server, Workload(prompt_tokens=3000))


async def test_a_full_server_is_counted_and_not_a_failure(say: Say) -> None:
    url = await say(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nfull")
    target = Target("it", url, Access(model="any"))
    figures, first_error = await target.measure(Workload(clients=2, requests=6, warm_up=0), ANYTHING, lambda: None)
    assert (figures["requests"], figures["refused"], figures["errors"]) == (0, 6, 0)
    assert first_error == "503: full"


async def test_streams_beside_a_long_prompt(running_server: Server) -> None:
    workload = Workload(clients=2, prompt_tokens=16, output_tokens=2000, beside=1000)
    async with working(running_server, length=2000):
        figures = await beside(Client(running_server.base_url), running_server.model, workload, alone_seconds=0.1)
        await asyncio.to_thread(wait_for, lambda: in_flight(running_server) == 0)  # its streams end with it
    assert figures["prefill_tokens_per_second"] * figures["prefill_seconds"] == pytest.approx(1000)
    assert figures["alone_gaps"] > 0
    assert figures["beside_gaps"] >= 2  # at least the one of each stream in which the answer came
    assert figures["alone_gap_p50_ms"] <= figures["alone_gap_worst_ms"]


@pytest.mark.parametrize(
    ("arrivals", "alone", "beside"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], [1, 1], [1, 1, 1]),  # sent at 3.5, answered at 5.5
        ([1, 2, 3, 7, 8], [1, 1], [4]),  # stood still all the time
        ([1, 2, 3, 4, 9], [1, 1], [1, 5]),
        ([6, 7], [], []),
    ],
)
def test_every_gap_that_the_prompt_met_counts(arrivals: list[float], alone: list[float], beside: list[float]) -> None:
    requests = [Measured(0, arrivals=arrivals)]
    assert gaps_within(requests, 1, 3.5) == alone
    assert gaps_across(requests, 3.5, 5.5) == beside


async def test_a_stream_that_fails_beside_a_prompt_ends_it(running_server: Server) -> None:
    async with working(running_server):
        with pytest.raises(TargetError, match="400: "):
            await beside(Client(running_server.base_url), running_server.model, Workload(clients=2, prompt_tokens=3000))
