"""A request by its id: how it is doing, what happened to it when, and how it is ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from tests.service.api.conftest import accepted, ended, in_flight
from tests.service.api.serving import PacedWorker, Server, refused, wait_for, working
from tests.service.api.test_disconnect import until
from tokenrelay.service.broker import connect
from tokenrelay.service.messages import Error
from tokenrelay.service.token_log import Progress

Status = dict[str, Any]


@pytest.fixture
async def redis(server: Server) -> AsyncIterator[Redis]:
    async with connect(server.settings.redis_url) as client:
        yield client


@asynccontextmanager
async def asking(http: httpx.AsyncClient, server: Server, **fields: Any) -> AsyncIterator[asyncio.Task[httpx.Response]]:
    """A request that has been queued; its answer may come after the block."""
    before = accepted(server)
    body = {"model": server.model, "prompt": "1", **fields}
    answer = asyncio.create_task(http.post("/v1/completions", json=body))
    await until(lambda: accepted(server) == before + len(body["prompt"]))
    yield answer


async def status(http: httpx.AsyncClient, relay_id: str) -> Status:
    response = await http.get(f"/v1/requests/{relay_id}")
    assert response.status_code == 200, response.text
    times = [entry["at"] for entry in response.json()["timeline"]]
    assert times == sorted(times)
    return dict(response.json())


def events(found: Status) -> list[str]:
    return [entry["event"] for entry in found["timeline"]]


async def waiting(redis: Redis, server: Server) -> list[str]:
    """The ids in the queue, in its order."""
    names: Any = await redis.zrange(server.keys.waiting, 0, -1)
    return [name.decode() for name in names]


class TestStatus:
    async def test_a_waiting_request_knows_its_place(
        self, server: Server, http: httpx.AsyncClient, redis: Redis
    ) -> None:
        async with asking(http, server), asking(http, server), asking(http, server) as last:
            for position, relay_id in enumerate(await waiting(redis, server)):
                found = await status(http, relay_id)
                assert (found["state"], found["queue_position"]) == ("waiting", position)
                assert (found["outcome"], found["epoch"], events(found)) == (None, 0, ["queued"])
            async with working(server):
                await last

    async def test_a_finished_one_tells_its_whole_life(
        self, server: Server, http: httpx.AsyncClient, worker: PacedWorker
    ) -> None:
        begun_at = time.time()
        async with asking(http, server, n=2, max_tokens=5, timeout=600) as answer:
            answered = (await answer).json()
        found = await status(http, answered["id"])
        assert events(found) == ["queued", "claimed", "first_token", "finished"]
        assert found["timeline"][1] == {
            **{"at": found["timeline"][1]["at"], "event": "claimed", "worker": "paced", "epoch": 1}
        }
        assert all(begun_at - 0.1 < entry["at"] < time.time() + 0.1 for entry in found["timeline"])
        assert begun_at < found["deadline"] - 600 < time.time()
        assert {name: found[name] for name in ("id", "created", "model")} == {
            name: answered[name] for name in ("id", "created", "model")
        }
        assert (found["state"], found["outcome"], found["queue_position"]) == ("finished", "length", None)
        assert found["choices"] == [{"index": i, "completion_tokens": 5, "finish_reason": "length"} for i in (0, 1)]
        assert found["prompt_tokens"] == found["computed_prompt_tokens"] == answered["usage"]["prompt_tokens"]
        assert (found["last_event_id"], found["attempts"], found["on_disconnect"]) == ("10", 1, "cancel")

    async def test_a_running_one_tells_how_far_it_is(self, server: Server, http: httpx.AsyncClient) -> None:
        async with working(server, length=10**6, pace=0.01) as worker, asking(http, server, max_tokens=1000) as answer:
            await until(lambda: worker.claims)
            relay_id = worker.claims[0].submission.request_id
            before = after = await status(http, relay_id)
            while after["choices"][0]["completion_tokens"] < 20:
                after = await status(http, relay_id)
            assert before["state"] == after["state"] == "running"
            assert int(after["last_event_id"]) == after["choices"][0]["completion_tokens"]
            await http.delete(f"/v1/requests/{relay_id}")
            await answer

    async def test_the_progress_of_a_prompt_and_its_preemptions(self, server: Server, http: httpx.AsyncClient) -> None:
        async with working(server, held_back=True) as worker, asking(http, server, prompt=[[5] * 100]) as answer:
            await until(lambda: worker.claims)
            claim = worker.claims[0]
            relay_id = claim.submission.request_id

            async def after_report(num_computed: int, num_preemptions: int, running: bool) -> Status:
                progress = Progress(claim.epoch, num_computed, num_preemptions, running)
                await worker.token_log.report("paced", {relay_id: progress})
                return await status(http, relay_id)

            assert (await after_report(0, 0, False))["computed_prompt_tokens"] == 0
            assert (await after_report(64, 0, True))["computed_prompt_tokens"] == 64
            assert events(await after_report(0, 1, False))[2:] == ["preempted"]
            assert events(await after_report(0, 1, False))[2:] == ["preempted"]
            assert events(await after_report(32, 1, True))[2:] == ["preempted", "resumed"]
            quickly = await after_report(64, 2, True)  # preempted and resumed since the last report
            assert events(quickly)[2:] == ["preempted", "resumed"] * 2
            stale = {relay_id: Progress(claim.epoch + 1, 99, 9, True)}
            await worker.token_log.report("paced", stale)
            await worker.token_log.report("another", {relay_id: Progress(claim.epoch, 99, 9, True)})
            assert await status(http, relay_id) == quickly
            worker.gate.set()
            await answer

    async def test_every_attempt_is_told(self, server: Server, http: httpx.AsyncClient, redis: Redis) -> None:
        async with working(server, held_back=True) as worker, asking(http, server) as answer:
            await until(lambda: worker.claims)
            relay_id = worker.claims[0].submission.request_id
            worker.held.clear()  # it renews the lease no more; one renewal may be under way
            while not await worker.queue.reclaim():
                await redis.zadd(server.keys.leases, {relay_id: 1})
            await until(lambda: len(worker.claims) == 2)
            found = await status(http, relay_id)
            assert events(found) == ["queued", "claimed", "requeued", "claimed"]
            assert [entry.get("epoch") for entry in found["timeline"]] == [None, 1, None, 2]
            assert (found["epoch"], found["attempts"]) == (2, 2)
            worker.gate.set()
            await answer

    async def test_endless_preemptions_do_not_fill_the_broker(
        self, server: Server, http: httpx.AsyncClient, redis: Redis
    ) -> None:
        async with working(server, held_back=True) as worker, asking(http, server) as answer:
            await until(lambda: worker.claims)
            [claim] = worker.claims
            relay_id = claim.submission.request_id
            for count in range(300):
                await worker.token_log.report("paced", {relay_id: Progress(claim.epoch, 0, count, True)})
            timeline = await redis.hget(server.keys.request(relay_id), "timeline")
            assert timeline is not None
            assert len(timeline) < 5000
            worker.gate.set()
            await answer
        assert events(await status(http, relay_id))[-1] == "finished"

    async def test_several_prompts_are_told_of_as_one(
        self, server: Server, http: httpx.AsyncClient, redis: Redis
    ) -> None:
        async with asking(http, server, prompt=["a", "b"], n=2) as answer:
            names = await waiting(redis, server)
            relay_id = names[0].removesuffix("-0")
            assert (await status(http, relay_id))["queue_position"] == 1
            async with working(server):
                usage = (await answer).json()["usage"]
        found = await status(http, relay_id)
        assert (found["state"], found["prompt_tokens"], found["last_event_id"]) == (
            "finished",
            usage["prompt_tokens"],
            "16,16",
        )
        assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
        assert sum(choice["completion_tokens"] for choice in found["choices"]) == usage["completion_tokens"]
        for prompt in (0, 1):
            own = [entry["event"] for entry in found["timeline"] if entry["prompt"] == prompt]
            assert own == ["queued", "claimed", "first_token", "finished"]

    async def test_an_error_is_the_outcome(self, server: Server, http: httpx.AsyncClient) -> None:
        async with working(server, error=Error(message="Lost.", code="worker_lost")) as worker:
            async with asking(http, server) as answer:
                await answer
            found = await status(http, worker.claims[0].submission.request_id)
        assert (found["state"], found["outcome"]) == ("finished", "worker_lost")
        assert found["choices"] == [{"index": 0, "completion_tokens": 2, "finish_reason": None}]


async def cancel(http: httpx.AsyncClient, name: str, method: str) -> httpx.Response:
    url = f"/v1/requests/{name}"
    return await (http.delete(url) if method == "DELETE" else http.post(f"{url}/cancel"))


@pytest.mark.parametrize("method", ["DELETE", "POST"])
class TestCancel:
    async def test_a_waiting_request_ends_at_once(
        self, server: Server, http: httpx.AsyncClient, redis: Redis, method: str
    ) -> None:
        async with asking(http, server) as answer:
            [relay_id] = await waiting(redis, server)
            told = (await cancel(http, relay_id, method)).json()
            assert told == {"id": f"cmpl-{relay_id}", "object": "request.cancellation", "was": "waiting"}
            assert (await answer).status_code == 499
        assert await waiting(redis, server) == []
        assert (await cancel(http, relay_id, method)).json()["was"] == "finished"
        found = await status(http, relay_id)
        assert (found["outcome"], events(found)) == ("cancelled", ["queued", "finished"])

    async def test_a_running_request_ends_at_its_worker(
        self, server: Server, http: httpx.AsyncClient, method: str
    ) -> None:
        before = ended(server, "cancelled")
        async with working(server, length=10**6, pace=0.01) as worker, asking(http, server, max_tokens=1000) as answer:
            await until(lambda: worker.claims)
            relay_id = worker.claims[0].submission.request_id
            assert (await cancel(http, f"cmpl-{relay_id}", method)).json()["was"] == "running"
            assert (await answer).json()["error"]["code"] == "cancelled"
        assert (await cancel(http, relay_id, method)).json()["was"] == "finished"
        await asyncio.to_thread(wait_for, lambda: ended(server, "cancelled") == before + 1)

    async def test_a_finished_request_stays_what_it_was(
        self, server: Server, http: httpx.AsyncClient, worker: PacedWorker, method: str
    ) -> None:
        async with asking(http, server) as answer:
            name = (await answer).json()["id"]
        before = await status(http, name)
        assert (await cancel(http, name, method)).json()["was"] == "finished"
        assert await status(http, name) == before

    async def test_several_prompts_end_together(self, server: Server, http: httpx.AsyncClient, method: str) -> None:
        async with working(server, length=10**6, pace=0.01) as worker:
            async with asking(http, server, prompt=["a", "b"], max_tokens=1000) as answer:
                await until(lambda: len(worker.claims) == 2)
                relay_id = worker.claims[0].submission.request_id.partition("-")[0]
                assert (await cancel(http, relay_id, method)).json()["was"] == "running"
                assert (await answer).status_code == 499
            await until(lambda: in_flight(server) == 0)
            assert len(worker.cancelled) == 2

    async def test_an_unknown_request(self, server: Server, http: httpx.AsyncClient, method: str) -> None:
        assert refused(await cancel(http, "cmpl-" + "0" * 32, method), 404)["code"] == "not_found"
        assert refused(await cancel(http, "something", method), 404)["code"] == "not_found"
