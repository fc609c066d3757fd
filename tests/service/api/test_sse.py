"""Framing: what stands on the wire, line by line."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from tests.service.api.conftest import ended, in_flight
from tests.service.api.serving import Server, sse_events, wait_for, working
from tokenrelay.service.messages import Error, Event
from tokenrelay.service.token_log import Publication


def body(server: Server, **fields: Any) -> dict[str, Any]:
    return {"model": server.model, "messages": [{"role": "user", "content": "Hi"}], "stream": True, **fields}


async def test_every_chunk_has_an_id_to_resume_behind_and_done_is_last(server: Server, http: httpx.AsyncClient) -> None:
    async with working(server, length=3):
        response = await http.post("/v1/chat/completions", json=body(server, stream_options={"include_usage": True}))
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    *events, done = [event for event in sse_events(response.text) if "" not in event]
    assert done == {"data": "[DONE]"}
    # role and token, token, then token, finish and usage: what one event of the log became
    assert [event["id"] for event in events] == ["1.1", "1", "2", "3.1", "3.2", "3"]
    assert json.loads(events[0]["data"])["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert json.loads(events[4]["data"])["choices"] == [
        {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    ]


async def test_several_prompts_share_a_stream_and_each_has_its_place_in_the_id(
    server: Server, http: httpx.AsyncClient
) -> None:
    async with working(server, length=1):
        fields = {"model": server.model, "prompt": ["a", "b"], "stream": True}
        response = await http.post("/v1/completions", json=fields)
    ids = [event["id"] for event in sse_events(response.text)[:-1]]
    assert ids in (["1.1,0", "1,0", "1,1.1", "1,1"], ["0,1.1", "0,1", "1.1,1", "1,1"])


async def test_a_silent_stream_is_kept_alive_by_comments(server: Server, http: httpx.AsyncClient) -> None:
    async with (
        working(server, held_back=True, length=2) as worker,
        http.stream("POST", "/v1/chat/completions", json=body(server)) as response,
    ):
        lines = response.aiter_lines()
        assert [await anext(lines) for _ in range(2)] == ["retry: 1000", ": keep-alive"]
        worker.gate.set()
        rest = [line async for line in lines]
    assert rest[-2:] == ["data: [DONE]", ""]


async def test_a_failure_before_the_first_token_is_an_error_object_and_done(
    server: Server, http: httpx.AsyncClient
) -> None:
    async with working(server, error=Error(message="Lost.", code="worker_lost")):
        response = await http.post("/v1/chat/completions", json=body(server))
    error, done = [json_or_text(event) for event in sse_events(response.text)][-2:]
    assert error == {"error": {"message": "Lost.", "type": "server_error", "param": None, "code": "worker_lost"}}
    assert done == "[DONE]"
    assert '"finish_reason":"' not in response.text


async def test_what_came_with_a_failure_is_sent_before_it(server: Server, http: httpx.AsyncClient) -> None:
    """Chunks that are there together leave together; none is left behind."""
    events = [Event(text="a"), Event(text="b"), Event(error=Error(message="Lost.", code="worker_lost"))]
    async with working(server, held_back=True) as worker:
        reading = asyncio.create_task(http.post("/v1/chat/completions", json=body(server)))
        await asyncio.to_thread(wait_for, lambda: worker.claims)
        (claim,) = worker.claims
        await worker.token_log.finish("paced", Publication(claim.submission.request_id, claim.epoch, 1, events))
        *chunks, error, done = [json_or_text(event) for event in sse_events((await reading).text)]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "ab"
    assert (error["error"]["code"], done) == ("worker_lost", "[DONE]")


async def test_the_same_failure_is_an_http_status_without_a_stream(server: Server, http: httpx.AsyncClient) -> None:
    async with working(server, error=Error(message="Lost.", code="worker_lost")):
        response = await http.post("/v1/chat/completions", json=body(server, stream=False))
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "worker_lost"
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_reader_of_a_request_cancelled_by_id_gets_an_error(
    server: Server, http: httpx.AsyncClient, stream: bool
) -> None:
    before = ended(server, "cancelled")
    async with working(server, held_back=True) as worker:
        reading = asyncio.create_task(http.post("/v1/chat/completions", json=body(server, stream=stream)))
        await asyncio.to_thread(wait_for, lambda: worker.claims)
        await worker.queue.cancel(worker.claims[0].submission.request_id)
        await asyncio.to_thread(wait_for, lambda: worker.cancelled)
        worker.gate.set()
        response = await reading
    assert response.status_code == (200 if stream else 499)
    assert '"code":"cancelled"' in response.text
    wait_for(lambda: ended(server, "cancelled") == before + 1)


async def test_one_failed_prompt_ends_the_stream_and_cancels_the_others(
    server: Server, http: httpx.AsyncClient
) -> None:
    async with working(server, error=Error(message="Lost.", code="worker_lost")):
        fields = {"model": server.model, "prompt": ["a", "b"], "stream": True}
        response = await http.post("/v1/completions", json=fields)
        await asyncio.to_thread(wait_for, lambda: in_flight(server) == 0)  # while there is one who can cancel
    assert response.text.count('"worker_lost"') == 1
    assert response.text.endswith("data: [DONE]\n\n")


def json_or_text(event: dict[str, str]) -> Any:
    return event["data"] if event["data"] == "[DONE]" else json.loads(event["data"])
