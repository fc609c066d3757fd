"""POST /v1/messages: what stands on the wire, and what anthropic's client makes of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import AsyncAnthropic

from tests.service.api.anthropic.bodies import body
from tests.service.api.conftest import ended
from tests.service.api.serving import PacedWorker, Server, sse_events, wait_for, word, words, working
from tokenrelay.service.messages import Error

URL = "/v1/messages"
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
async def claude(server: Server) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(base_url=server.base_url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def wire(server: Server, **fields: Any) -> dict[str, Any]:
    return body(model=server.model, **fields)


async def test_a_message_has_anthropics_shape(server: Server, claude: AsyncAnthropic, worker: PacedWorker) -> None:
    worker.cached_tokens = 4
    message = await claude.messages.create(model=server.model, max_tokens=99, system="Be brief.", messages=QUESTION)
    assert message.id.startswith("msg_")
    assert message._request_id
    assert (message.type, message.role, message.model) == ("message", "assistant", server.model)
    assert [block.model_dump(include={"type", "text"}) for block in message.content] == [
        {"type": "text", "text": words(8)}
    ]
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    count = await claude.messages.count_tokens(model=server.model, system="Be brief.", messages=QUESTION)
    usage = message.usage
    assert usage.input_tokens + 4 == count.input_tokens
    assert (usage.cache_read_input_tokens, usage.cache_creation_input_tokens, usage.output_tokens) == (4, 0, 8)


async def test_the_events_come_in_anthropics_order(server: Server, http: httpx.AsyncClient) -> None:
    async with working(server, length=2):
        response = await http.post(URL, json=wire(server, stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["request-id"] == response.headers["x-request-id"]
    events = [event for event in sse_events(response.text) if event.get("event") != "ping"]
    data = [json.loads(event["data"]) for event in events]
    assert [event["event"] for event in events] == [told["type"] for told in data]
    assert [event["id"] for event in events] == ["1.1", "1.2", "1", "2.1", "2.2", "2.3", "2"]
    start, *others = data
    assert start["message"]["id"] == response.headers["x-response-id"]
    assert (start["message"]["content"], start["message"]["stop_reason"]) == ([], None)
    assert start["message"]["usage"]["output_tokens"] == 0
    assert others == [
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word(0)}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word(1)}},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {
                "input_tokens": start["message"]["usage"]["input_tokens"],
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0,
                "output_tokens": 2,
            },
        },
        {"type": "message_stop"},
    ]


async def test_the_clients_stream_makes_up_the_message(
    server: Server, claude: AsyncAnthropic, worker: PacedWorker
) -> None:
    async with claude.messages.stream(model=server.model, max_tokens=3, messages=QUESTION) as stream:
        texts = [text async for text in stream.text_stream]
        message = await stream.get_final_message()
    assert "".join(texts) == words(3)
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 3)


async def test_a_silent_stream_pings(server: Server, http: httpx.AsyncClient) -> None:
    async with (
        working(server, held_back=True, length=2) as worker,
        http.stream("POST", URL, json=wire(server, stream=True)) as response,
    ):
        lines = response.aiter_lines()
        assert [await anext(lines) for _ in range(4)] == ["retry: 1000", "event: ping", 'data: {"type":"ping"}', ""]
        worker.gate.set()
        rest = [line async for line in lines]
    assert rest.count("event: message_stop") == 1


@pytest.mark.parametrize("seen", range(8))
async def test_a_stream_is_resumable_behind_any_event(server: Server, http: httpx.AsyncClient, seen: int) -> None:
    async with working(server, length=2):
        response = await http.post(URL, json=wire(server, stream=True))
        events = sse_events(response.text)
        last = events[seen - 1]["id"] if seen else "0"
        resumed = await http.get(
            f"/v1/requests/{response.headers['x-response-id']}/stream", headers={"Last-Event-ID": last}
        )
    assert [event["data"] for event in (sse_events(resumed.text) if seen < 7 else [])] == [
        event["data"] for event in events[seen:]
    ]


async def test_more_tokens_than_fit_are_as_many_as_fit(server: Server, claude: AsyncAnthropic) -> None:
    async with working(server, length=10**6, pace=0) as worker:
        count = await claude.messages.count_tokens(model=server.model, messages=QUESTION)
        async with claude.messages.stream(model=server.model, max_tokens=32_000, messages=QUESTION) as stream:
            await anext(aiter(stream))
        [claim] = worker.claims
        assert claim.submission.params.max_tokens == server.process.model.max_model_len - count.input_tokens
        await asyncio.to_thread(wait_for, lambda: worker.cancelled)


async def test_a_text_that_filled_the_context_says_so(server: Server, claude: AsyncAnthropic) -> None:
    filler: Any = [{"role": "user", "content": "a " * (server.process.model.max_model_len - 60)}]
    async with working(server, length=99):
        message = await claude.messages.create(model=server.model, max_tokens=4096, messages=filler)
    assert message.stop_reason == "model_context_window_exceeded"


@pytest.mark.parametrize(
    ("fields", "status", "kind"),
    [
        ({"max_tokens": None}, 400, "invalid_request_error"),
        ({"model": "nobody"}, 404, "not_found_error"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 400, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": "a " * 4000}]}, 400, "invalid_request_error"),
    ],
)
async def test_a_refusal_has_anthropics_shape(
    server: Server, http: httpx.AsyncClient, fields: dict[str, Any], status: int, kind: str
) -> None:
    response = await http.post(URL, json=wire(server) | fields)
    assert response.status_code == status
    assert response.headers["request-id"]
    told = response.json()
    assert (told["type"], told["error"]["type"]) == ("error", kind)
    assert told["error"].keys() == {"type", "message"}


async def test_a_wrong_method_is_refused_in_the_same_shape(server: Server, http: httpx.AsyncClient) -> None:
    response = await http.get(URL)
    assert (response.status_code, response.json()["error"]["type"]) == (405, "invalid_request_error")


async def test_clients_know_the_errors(server: Server, claude: AsyncAnthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="nobody"):
        await claude.messages.create(model="nobody", max_tokens=1, messages=QUESTION)
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        await claude.messages.create(
            model=server.model, max_tokens=1, messages=QUESTION, extra_body={"temperature": -1}
        )


async def test_a_failure_ends_the_stream_with_one_error_event(
    server: Server, http: httpx.AsyncClient, claude: AsyncAnthropic
) -> None:
    async with working(server, error=Error(message="Lost.", code="worker_lost")):
        response = await http.post(URL, json=wire(server, stream=True))
        with pytest.raises(anthropic.APIStatusError, match=r"Lost\."):
            async with claude.messages.stream(model=server.model, max_tokens=9, messages=QUESTION) as stream:
                await stream.get_final_message()
    last = sse_events(response.text)[-1]
    assert last == {"event": "error", "data": '{"type":"error","error":{"type":"api_error","message":"Lost."}}'}
    assert "message_stop" not in response.text


async def test_a_client_that_leaves_cancels(server: Server, claude: AsyncAnthropic) -> None:
    before = ended(server, "cancelled")
    async with working(server, length=10**6, pace=0.01):
        async with claude.messages.stream(model=server.model, max_tokens=999, messages=QUESTION) as stream:
            await anext(aiter(stream.text_stream))
        await asyncio.to_thread(wait_for, lambda: ended(server, "cancelled") == before + 1)
