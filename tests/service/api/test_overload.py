"""Ten times as many requests as can be served: what is accepted is served as fast as ever, the rest is refused at once
and told when to come back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import httpx
import pytest

from tests.service.api.serving import Server, working
from tokenrelay.service.embedded_valkey import EmbeddedValkey
from tokenrelay.service.settings import Settings

SECONDS_PER_REQUEST = 0.4  # one at a time
ARRIVALS = 10 / SECONDS_PER_REQUEST  # per second
WAITING = 8
DEADLINE = 60.0  # seconds: the last in a full queue is served in a tenth of it, on a machine that has time
GOODPUT = 0.9  # of the peak
PROBED = 3  # every third client's coming is also a look at /livez


@pytest.fixture(scope="module")
def api_settings(valkey: EmbeddedValkey) -> Settings:
    return Settings(redis_url=valkey.url, max_waiting=WAITING, drain_seconds=0.5)


@dataclass
class Outcome:
    """What became of the requests of one run. Times are in seconds."""

    answered_at: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    refused_within: list[float] = field(default_factory=list)
    retry_after: list[float] = field(default_factory=list)
    came_within: float = 0.0  # all of them
    alive_within: list[float] = field(default_factory=list)  # /livez at the same time: what this machine takes anyway

    def note(self, response: httpx.Response, sent_at: float) -> None:
        now = time.monotonic()
        if response.status_code == 200:
            assert response.json()["choices"][0]["finish_reason"] == "stop"
            self.answered_at.append(now)
            self.waited.append(now - sent_at - SECONDS_PER_REQUEST)
            return
        assert response.status_code == 503, response.text  # 504: accepted, and then not done by its deadline
        assert 1 <= int(response.headers["retry-after"]) <= 120
        assert response.headers["x-should-retry"] == "true"
        self.refused_within.append(now - sent_at)
        self.retry_after.append(int(response.headers["retry-after-ms"]) / 1000)

    def throughput(self) -> float:
        """Answers per second, from the first to the last."""
        return (len(self.answered_at) - 1) / (self.answered_at[-1] - self.answered_at[0])


@pytest.fixture
async def http(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    async with httpx.AsyncClient(base_url=server.base_url, timeout=90, limits=limits) as http:
        yield http


async def ask(server: Server, http: httpx.AsyncClient, outcome: Outcome) -> None:
    sent_at = time.monotonic()
    body = {"model": server.model, "prompt": "Once", "max_tokens": 100, "timeout": DEADLINE}
    outcome.note(await http.post("/v1/completions", json=body), sent_at)


async def peak_throughput(server: Server, http: httpx.AsyncClient, seconds: float) -> float:
    """Of two clients, each of which waits for its answer."""
    outcome, begun_at = Outcome(), time.monotonic()

    async def client() -> None:
        while time.monotonic() < begun_at + seconds:
            await ask(server, http, outcome)

    await asyncio.gather(client(), client())
    return outcome.throughput()


async def probe(http: httpx.AsyncClient, outcome: Outcome) -> None:
    sent_at = time.monotonic()
    await http.get("/livez")
    outcome.alive_within.append(time.monotonic() - sent_at)


async def flood(server: Server, http: httpx.AsyncClient, seconds: float) -> Outcome:
    """An open loop: clients come whether earlier ones got their answers or not."""
    outcome, begun_at = Outcome(), time.monotonic()
    async with asyncio.TaskGroup() as clients:
        for number in range(round(ARRIVALS * seconds)):
            await asyncio.sleep(begun_at + number / ARRIVALS - time.monotonic())
            clients.create_task(ask(server, http, outcome))
            if number % PROBED == 0:
                clients.create_task(probe(http, outcome))
        outcome.came_within = time.monotonic() - begun_at
    return outcome


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[round(share * (len(values) - 1))]


async def check(server: Server, http: httpx.AsyncClient, seconds: float, share: float) -> None:
    """``share``: of the peak's answers per second, that must be left under overload."""
    async with working(server, slots=1, length=2, pace=SECONDS_PER_REQUEST):
        peak = await peak_throughput(server, http, seconds / 5)
        outcome = await flood(server, http, seconds)
    most = 0.99 if share == GOODPUT else 0.75  # of a short run, a moment that others had the processor for is a part
    alive, refused = (percentile(taken, most) for taken in (outcome.alive_within, outcome.refused_within))
    print(f"goodput {outcome.throughput():.2f}/s of {peak:.2f}/s; refused within {1000 * refused:.0f} ms")
    print(f"/livez within {1000 * alive:.0f} ms; {len(outcome.answered_at)} answered in time, none late")
    assert outcome.throughput() >= share * peak
    assert len(outcome.answered_at) <= outcome.came_within / SECONDS_PER_REQUEST + WAITING + 2  # the rest was refused
    assert refused < 0.05 + 2 * alive * (share < GOODPUT)
    told, waited = (percentile(values[-20:], 0.5) for values in (outcome.retry_after, outcome.waited))
    assert waited / 2 < told < waited * 2


async def test_overload(server: Server, http: httpx.AsyncClient) -> None:
    await check(server, http, seconds=5, share=GOODPUT / 4)  # the machine may have become busier meanwhile


@pytest.mark.long
async def test_overload_for_long(server: Server, http: httpx.AsyncClient) -> None:
    await check(server, http, seconds=60, share=GOODPUT)
