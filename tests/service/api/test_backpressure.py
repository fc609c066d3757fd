"""A full queue refuses at once and says until when; whoever waits in it may ask how long."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from tests.service.api.conftest import in_flight
from tests.service.api.serving import PacedWorker, Server, refused, serving, wait_for, words, working
from tests.service.api.test_metrics import scrape
from tests.service.relay import measured, nothing_ended_for
from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.service.api.served_model import ServedModel
from tokenrelay.service.broker import connect
from tokenrelay.service.embedded_valkey import EmbeddedValkey
from tokenrelay.service.settings import Settings
from tokenrelay.service.token_log import Progress

WAITING = 3
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def api_settings(valkey: EmbeddedValkey) -> Settings:
    return Settings(redis_url=valkey.url, max_waiting=WAITING, drain_seconds=0.5)


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenrelay.service.api.streaming.queue_watch.LOOK_SECONDS", 0.01)


def body(server: Server, **fields: Any) -> dict[str, Any]:
    return {"model": server.model, "messages": [{"role": "user", "content": "Hi"}], **fields}


@asynccontextmanager
async def queued(
    server: Server, http: httpx.AsyncClient, count: int = WAITING, **fields: Any
) -> AsyncIterator[asyncio.Future[list[httpx.Response]]]:
    """So many requests wait, until a worker comes. In the end all are answered."""
    answers = asyncio.gather(*(http.post(CHAT, json=body(server, **fields)) for _ in range(count)))
    await asyncio.to_thread(wait_for, lambda: in_flight(server) == count)
    try:
        yield answers
        async with working(server):
            assert {answer.status_code for answer in await answers} == {200}
    finally:
        answers.cancel()


def refusals(server: Server) -> float:
    labels = {"model_name": server.model, "code": "server_is_overloaded"}
    return server.metrics.get_sample_value("tokenrelay_requests_refused_total", labels) or 0.0


class TestRefusal:
    async def test_it_says_when_to_try_again(self, server: Server, http: httpx.AsyncClient) -> None:
        async with queued(server, http):
            refusal = await http.post(CHAT, json=body(server))
            assert refusal.status_code == 503
            assert refusal.json()["error"]["code"] == "server_is_overloaded"
            assert 1 <= int(refusal.headers["retry-after"]) <= 120
            assert 0 < int(refusal.headers["retry-after-ms"]) <= 120_000
            assert refusal.headers["x-should-retry"] == "true"

    async def test_while_it_refuses_nothing_is_tokenized(
        self, server: Server, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with queued(server, http):
            assert (await http.post(CHAT, json=body(server))).status_code == 503

            def fail(*_: object, **__: object) -> None:
                raise AssertionError("tokenized in vain")

            with monkeypatch.context() as patch:
                patch.setattr(Tokenizer, "encode_chat", fail)
                assert (await http.post(CHAT, json=body(server))).status_code == 503

    async def test_a_mistake_is_no_reason_to_try_again(self, server: Server, http: httpx.AsyncClient) -> None:
        refusal = await http.post(CHAT, json=body(server, temperature=-1))
        assert refusal.headers["x-should-retry"] == "false"
        assert "retry-after" not in refusal.headers

    async def test_openais_client_comes_back_by_itself(self, server: Server, http: httpx.AsyncClient) -> None:
        client = AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="none", timeout=60, max_retries=9)
        async with client, queued(server, http) as answers:
            before = refusals(server)
            patient = asyncio.create_task(client.chat.completions.create(**body(server)))
            await asyncio.to_thread(wait_for, lambda: refusals(server) > before)
            async with working(server):
                assert (await patient).choices[0].message.content == words(8)
                await answers  # what this worker has claimed is lost with it

    async def test_a_deadline_that_cannot_be_met_is_refused_at_once(
        self, server: Server, http: httpx.AsyncClient
    ) -> None:
        async with queued(server, http, WAITING - 1), connect(server.settings.redis_url) as redis:
            await measured(redis, server.keys, tokens_per_second=1)
            refusal = await http.post(CHAT, json=body(server, timeout=5))
            assert (refusal.status_code, refusal.json()["error"]["code"]) == (503, "deadline_unreachable")
            assert int(refusal.headers["retry-after"]) > 5


async def test_two_processes_share_the_limits(
    server: Server, served_model: ServedModel, http: httpx.AsyncClient
) -> None:
    with serving(server.settings, served_model) as other_server:
        other = httpx.AsyncClient(base_url=other_server.base_url, timeout=60)
        async with other, queued(server, http, WAITING - 1) as answers:
            last = asyncio.create_task(other.post(CHAT, json=body(server)))
            await asyncio.to_thread(wait_for, lambda: in_flight(other_server) == 1)
            for client in (http, other):
                assert (await client.post(CHAT, json=body(server))).status_code == 503
            async with asyncio.timeout(60):
                for client in (http, other):
                    while (await scrape(client))["tokenrelay_num_requests_waiting"] != WAITING:
                        pass
            async with working(server):
                assert (await last).status_code == 200
                await answers


async def test_the_queue_is_measured(server: Server, http: httpx.AsyncClient) -> None:
    async with queued(server, http):
        async with asyncio.timeout(60):
            while (samples := await scrape(http))["tokenrelay_num_requests_waiting"] != WAITING:
                pass
        assert samples["tokenrelay_num_tokens_waiting"] > WAITING * 8
        assert samples["tokenrelay_waiting_bytes"] > 0
        assert samples["tokenrelay_estimated_wait_seconds"] > 0


async def events_of(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """Each server-sent event as it comes; its data is parsed."""
    event: dict[str, Any] = {}
    async for line in response.aiter_lines():
        name, _, value = line.partition(": ")
        if not line:
            yield {**event, "data": event["data"] if event["data"] == "[DONE]" else json.loads(event["data"])}
            event = {}
        elif name in ("event", "data", "id"):
            event[name] = value


class TestInterim:
    """What a stream says before its first text, if its client asked."""

    async def test_who_did_not_ask_hears_nothing(self, server: Server, http: httpx.AsyncClient) -> None:
        async with queued(server, http, 2, stream=True) as answers:
            pass
        for answer in answers.result():
            assert "event:" not in answer.text
            assert "progress" not in answer.text

    async def test_the_place_in_the_queue_comes_before_the_text(self, server: Server, http: httpx.AsyncClient) -> None:
        asking = body(server, stream=True, stream_options={"include_queue": True})
        async with working(server, held_back=True, slots=1, pace=0.05) as worker:
            others = asyncio.gather(*(http.post(CHAT, json=body(server)) for _ in range(3)))
            await asyncio.to_thread(wait_for, lambda: in_flight(server) == 3 and worker.claims)
            async with http.stream("POST", CHAT, json=asking) as response:
                events = events_of(response)
                first = await anext(events)
                worker.gate.set()
                rest = [event async for event in events]
            await others
        assert first["event"] == "queue"
        assert first["data"].keys() >= {"position", "estimated_wait_seconds"}
        assert first["data"]["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": None}]
        assert "id" not in first
        told = [first, *(event for event in rest if event.get("event") == "queue")]
        positions = [event["data"]["position"] for event in told]
        assert positions == sorted(positions, reverse=True)
        assert {2} < set(positions) <= {2, 1, 0}  # one may pass between two looks
        assert told[-1]["data"]["estimated_wait_seconds"] > 0
        assert rest[: len(told) - 1] == told[1:]  # all of them before the text
        assert text_of(rest) == words(8)

    async def test_whoever_reads_the_stream_hears_it(self, server: Server, http: httpx.AsyncClient) -> None:
        """At a standstill: then nothing tells for how long."""
        asking = body(server, stream=True, stream_options={"include_queue": True})
        async with (
            queued(server, http, 1),
            connect(server.settings.redis_url) as redis,
            http.stream("POST", CHAT, json=asking) as original,
        ):
            await measured(redis, server.keys, tokens_per_second=1)
            await nothing_ended_for(redis, server.keys, seconds=3600)
            resumed = f"/v1/requests/{original.headers['x-response-id']}/stream"
            async with http.stream("GET", resumed) as response:
                event = await anext(events_of(response))
        assert event["event"] == "queue"
        assert (event["data"]["position"], event["data"]["estimated_wait_seconds"]) == (1, None)

    @pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
    async def test_the_prompts_progress_as_llama_cpp_tells_it(
        self, server: Server, http: httpx.AsyncClient, path: str
    ) -> None:
        asking = body(server, stream=True, return_progress=True) if path == CHAT else completion(server, ["Once"])
        async with working(server, held_back=True) as worker, http.stream("POST", path, json=asking) as response:
            await asyncio.to_thread(wait_for, lambda: worker.claims)
            events = events_of(response)
            told = []
            for num_computed in (2, 3):
                await tell_progress(worker, num_computed, num_cached=1)
                event = await anext(events)
                while event["data"]["prompt_progress"]["processed"] != num_computed:
                    event = await anext(events)
                told.append(event["data"]["prompt_progress"])
            worker.gate.set()
            rest = [event async for event in events]
        num_prompt_tokens = len(worker.claims[0].submission.prompt_token_ids)
        assert [(progress["total"], progress["cache"]) for progress in told] == [(num_prompt_tokens, 1)] * 2
        assert 0 <= told[0]["time_ms"] <= told[1]["time_ms"]
        assert text_of(rest) == words(8)

    async def test_several_prompts_are_added_up(self, server: Server, http: httpx.AsyncClient) -> None:
        asking = completion(server, ["Once", "Twice upon a time"])
        async with (
            working(server, held_back=True) as worker,
            http.stream("POST", "/v1/completions", json=asking) as response,
        ):
            await asyncio.to_thread(wait_for, lambda: len(worker.claims) == 2)
            await tell_progress(worker, 1)
            events = events_of(response)
            while (event := await anext(events))["data"]["prompt_progress"]["processed"] != 2:
                pass
            worker.gate.set()
            assert [event async for event in events][-1]["data"] == "[DONE]"
        lengths = [len(claim.submission.prompt_token_ids) for claim in worker.claims]
        assert event["data"]["prompt_progress"]["total"] == sum(lengths)

    async def test_openais_client_goes_on_as_ever(self, server: Server, http: httpx.AsyncClient) -> None:
        asking = body(server, stream_options={"include_queue": True})
        async with AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="none", timeout=60) as client:
            async with queued(server, http, 1):
                stream = await client.chat.completions.create(
                    **asking, stream=True, extra_body={"return_progress": True}
                )
                first = await anext(aiter(stream))
                assert first.model_extra
                assert first.model_extra["position"] == 1
            async with working(server):
                assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == words(8)
                async with client.chat.completions.stream(**asking) as events:
                    assert (await events.get_final_completion()).choices[0].message.content == words(8)

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"return_progress": True}, "return_progress"),
            ({"stream_options": {"include_queue": True}}, "stream_options"),
            ({"stream": True, "stream_options": {"include_queue": 1}}, "stream_options.include_queue"),
        ],
    )
    async def test_only_in_a_stream(
        self, server: Server, http: httpx.AsyncClient, fields: dict[str, Any], param: str
    ) -> None:
        assert refused(await http.post(CHAT, json=body(server, **fields)))["param"] == param


def completion(server: Server, prompt: list[str]) -> dict[str, Any]:
    return {"model": server.model, "prompt": prompt, "stream": True, "return_progress": True}


async def tell_progress(worker: PacedWorker, num_computed: int, num_cached: int = 0) -> None:
    """Of every prompt."""
    for claim in worker.claims:
        progress = Progress(claim.epoch, num_computed, 0, True, num_cached)
        await worker.token_log.report("paced", {claim.submission.request_id: progress})


def text_of(events: list[dict[str, Any]]) -> str:
    choices = [choice for event in events[:-1] for choice in event["data"]["choices"]]
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices)
