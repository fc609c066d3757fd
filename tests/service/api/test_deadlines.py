"""A request that is not done in time ends in time: in the queue at no cost, at work with what there is."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any, Self

import httpx
import pytest

from tests.service.api.conftest import accepted, ended
from tests.service.api.serving import Server, refused, sse_events, wait_for, working
from tests.service.api.test_requests import asking, status
from tokenrelay.service.api.lifecycle.deadline import REPLY_SECONDS, Deadline
from tokenrelay.service.broker import connect
from tokenrelay.service.embedded_valkey import EmbeddedValkey
from tokenrelay.service.errors import BrokerUnavailable, DeadlineExceeded
from tokenrelay.service.settings import Settings

LATE = 0.1  # seconds behind its deadline in which a response must have ended
ATTEMPTS = 6
DEFAULT = 300.0


@pytest.fixture(scope="module")
def api_settings(valkey: EmbeddedValkey) -> Settings:
    return Settings(redis_url=valkey.url, drain_seconds=0.5, request_timeout_seconds=DEFAULT)


async def ask(
    http: httpx.AsyncClient, server: Server, headers: Mapping[str, str] | None = None, **fields: Any
) -> tuple[float, httpx.Response]:
    """The answer, and the seconds it took."""
    body = {"model": server.model, "prompt": "Once", "max_tokens": 1000, **fields}
    sent_at = time.monotonic()
    response = await http.post("/v1/completions", json=body, headers=headers)
    return time.monotonic() - sent_at, response


async def ask_in_time(http: httpx.AsyncClient, server: Server, deadline: float, **how: Any) -> httpx.Response:
    """An answer that came neither before its deadline nor late; again, if the machine was busy with something else."""
    seconds = []
    for _ in range(ATTEMPTS):
        taken, response = await ask(http, server, **how)
        seconds.append(taken)
        assert taken >= deadline
        if taken < deadline + LATE:
            return response
    raise AssertionError(f"late every time: {seconds}")


@pytest.fixture
async def warm(server: Server, http: httpx.AsyncClient) -> None:
    """The connection is there and the scripts are loaded, so that only the deadline is measured."""
    async with working(server):
        await ask(http, server)


@pytest.mark.usefixtures("warm")
class TestInTheQueue:
    @pytest.mark.parametrize("how", [{"headers": {"X-Request-Timeout": "0.25"}}, {"timeout": 0.25}])
    async def test_it_ends_with_504(self, server: Server, http: httpx.AsyncClient, how: dict[str, Any]) -> None:
        before = ended(server), ended(server, "deadline_exceeded")
        response = await ask_in_time(http, server, 0.25, **how)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert response.headers["x-should-retry"] == "false"
        assert ended(server, "deadline_exceeded") - before[1] == ended(server) - before[0] > 0

    async def test_and_a_stream_with_an_error_object(self, server: Server, http: httpx.AsyncClient) -> None:
        response = await ask_in_time(http, server, 0.25, timeout=0.25, stream=True)
        error, done = sse_events(response.text)
        assert (json.loads(error["data"])["error"]["code"], done["data"]) == ("deadline_exceeded", "[DONE]")

    async def test_no_worker_ever_sees_it(self, server: Server, http: httpx.AsyncClient) -> None:
        await asyncio.gather(*(ask(http, server, timeout=0.05) for _ in range(3)))
        async with working(server) as worker:
            await ask(http, server)
            assert len(worker.claims) == 1
        async with connect(server.settings.redis_url) as redis:
            assert await redis.zcard(server.keys.waiting) == await redis.zcard(server.keys.deadlines) == 0

    async def test_the_shorter_of_two_deadlines_counts(self, server: Server, http: httpx.AsyncClient) -> None:
        for header, timeout in (("0.1", 60), ("60", 0.1)):
            seconds, response = await ask(http, server, {"X-Request-Timeout": header}, timeout=timeout)
            assert response.status_code == 504
            assert seconds < 30


@pytest.mark.usefixtures("warm")
class TestAtWork:
    async def test_what_there_is_was_streamed_already(self, server: Server, http: httpx.AsyncClient) -> None:
        async with working(server, length=10**6, pace=0.01) as worker:
            response = await ask_in_time(http, server, 1.0, timeout=1.0, stream=True)
            await asyncio.to_thread(wait_for, lambda: worker.lost)  # it is told so by its next renewal
        *chunks, error, done = [json.loads(event["data"]) for event in sse_events(response.text)[:-1]] + ["[DONE]"]
        assert error["error"]["code"] == "deadline_exceeded"
        assert [chunk["choices"][0]["text"] for chunk in chunks] == [f" w{i}" for i in range(len(chunks))]
        assert len(chunks) > 3
        assert done

    async def test_an_answer_that_is_not_streamed_is_a_504(self, server: Server, http: httpx.AsyncClient) -> None:
        async with working(server, length=10**6, pace=0.01):
            assert (await ask_in_time(http, server, 0.3, timeout=0.3)).status_code == 504

    async def test_who_is_done_in_time_hears_nothing_of_it(self, server: Server, http: httpx.AsyncClient) -> None:
        async with working(server):
            _, response = await ask(http, server, timeout=20)
        assert response.json()["choices"][0]["finish_reason"] == "stop"
        async with connect(server.settings.redis_url) as redis:
            assert await redis.zcard(server.keys.deadlines) == 0

    async def test_a_later_reader_has_the_same_deadline(self, server: Server, http: httpx.AsyncClient) -> None:
        late = [await self.read_by_another(server, http)]
        while late[-1] >= LATE:
            assert len(late) < ATTEMPTS, late
            late.append(await self.read_by_another(server, http))

    async def read_by_another(self, server: Server, http: httpx.AsyncClient) -> float:
        """How many seconds behind the deadline that one's stream ended."""
        async with working(server, held_back=True) as worker, asking(http, server, timeout=1.5) as answer:
            await asyncio.to_thread(wait_for, lambda: worker.claims)
            relay_id = worker.claims[0].submission.request_id
            second = await http.get(f"/v1/requests/{relay_id}/stream")
            ended_at = time.time()
            found = await status(http, relay_id)
            assert "deadline_exceeded" in second.text
            assert (await answer).status_code == 504
        assert (found["outcome"], found["timeline"][-1]["event"]) == ("deadline_exceeded", "finished")
        return float(ended_at - found["deadline"])


async def test_the_default_is_a_setting(server: Server, http: httpx.AsyncClient) -> None:
    async with working(server):
        _, response = await ask(http, server)
    found = await status(http, response.json()["id"])
    assert found["deadline"] == pytest.approx(found["timeline"][0]["at"] + DEFAULT, abs=0.01)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "", "soon", "1e9", "0x10"])
async def test_a_header_that_is_no_number_of_seconds(server: Server, http: httpx.AsyncClient, value: str) -> None:
    before = accepted(server)
    _, response = await ask(http, server, {"X-Request-Timeout": value})
    assert refused(response)["param"] == "X-Request-Timeout"
    assert accepted(server) == before


@pytest.mark.parametrize("value", [0, -1, "5", 1e9, True])
async def test_a_field_that_is_no_number_of_seconds(server: Server, http: httpx.AsyncClient, value: Any) -> None:
    _, response = await ask(http, server, timeout=value)
    assert refused(response)["param"] == "timeout"


# --- when the broker does not say what it should ----------------------------------------------------------------------


class _Nothing:
    """Events of a request, none of which ever comes."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> int:
        await asyncio.Event().wait()
        return 0


class _Broker:
    """Says of every request that so many seconds are left; or, being gone, raises, or says nothing."""

    def __init__(self, *replies: float | Exception | None) -> None:
        self._replies = list(replies)
        self.asked = 0

    async def expire(self, request_id: str) -> float | None:
        self.asked += 1
        if not self._replies:
            await asyncio.Event().wait()
        reply = self._replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply


@pytest.mark.parametrize("replies", [[], [None], [BrokerUnavailable("gone")]], ids=["hangs", "is slow", "is gone"])
async def test_the_client_does_not_wait_for_a_broker(replies: list[Any]) -> None:
    taken = []
    for _ in range(ATTEMPTS):
        broker: Any = _Broker(*replies)
        started_at = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await Deadline(broker, "a", 0.05).next(_Nothing())
        taken.append(time.monotonic() - started_at)
        assert broker.asked == 1
    assert min(taken) < 0.05 + 2 * REPLY_SECONDS + LATE


async def test_a_deadline_that_is_not_over_by_the_brokers_clock_is_waited_for() -> None:
    broker: Any = _Broker(0.05, 0.05, None)
    started_at = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await Deadline(broker, "a", 0.05).next(_Nothing())
    assert time.monotonic() - started_at >= 3 * 0.05 + REPLY_SECONDS
