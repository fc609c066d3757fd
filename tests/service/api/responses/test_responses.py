"""Responses over HTTP, by openai's own client: made, streamed, refused."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from tests.service.api.responses.openai_events import require_whole
from tests.service.api.serving import PacedWorker, Server, refused, sse_events, words, working
from tokenrelay.service.messages import Error

Fields = dict[str, Any]
URL = "/v1/responses"
PNG = "data:image/png;base64,AAAA"


async def streamed(http: httpx.AsyncClient, server: Server, **fields: Any) -> list[Fields]:
    body = {"model": server.model, "input": "Hi", "stream": True, **fields}
    return events_in(await http.post(URL, json=body))


def events_in(response: httpx.Response) -> list[Fields]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = sse_events(response.text)
    events = [json.loads(frame["data"]) for frame in frames]
    assert [frame["event"] for frame in frames] == [event["type"] for event in events]
    return events


async def test_a_text_is_answered(client: AsyncOpenAI, server: Server, worker: PacedWorker) -> None:
    response = await client.responses.create(model=server.model, input="Hi", instructions="Be brief.", temperature=0)
    assert response.status == "completed"
    assert response.output_text == words(8)
    assert response.usage
    assert response.usage.output_tokens == 8
    assert (response.instructions, response.temperature, response.top_p) == ("Be brief.", 0, 1)
    prompt = server.process.model.tokenizer.decode(worker.claims[0].submission.prompt_token_ids)
    assert "Be brief." in prompt


async def test_a_stream_tells_the_same(http: httpx.AsyncClient, server: Server, worker: PacedWorker) -> None:
    events = await streamed(http, server, seed=7)
    require_whole(events)
    final = events[-1]["response"]
    whole = (await http.post(URL, json={"model": server.model, "input": "Hi", "seed": 7})).json()
    assert [part["text"] for part in final["output"][0]["content"]] == [words(8)]
    for response in (final, whole):
        response["output"][0]["id"] = response["id"] = response["created_at"] = None
    assert final == whole


async def test_the_clients_own_stream(client: AsyncOpenAI, server: Server, worker: PacedWorker) -> None:
    async with client.responses.stream(model=server.model, input="Hi") as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert final.output_text == words(8)
    assert kinds[-1] == "response.completed"


async def test_the_id_is_told_while_it_waits(server: Server, http: httpx.AsyncClient) -> None:
    body = {"model": server.model, "input": "Hi", "stream": True}
    async with working(server, held_back=True) as worker, http.stream("POST", URL, json=body) as response:
        lines = response.aiter_lines()
        told = [await anext(lines) for _ in range(3)]
        created = json.loads(told[-1].removeprefix("data: "))
        assert created["type"] == "response.created"
        assert created["response"]["id"] == response.headers["x-response-id"]
        worker.gate.set()
        assert "response.completed" in [line.removeprefix("event: ") async for line in lines]


async def test_too_few_tokens_make_it_incomplete(client: AsyncOpenAI, server: Server, worker: PacedWorker) -> None:
    response = await client.responses.create(model=server.model, input="Hi", max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output_text == words(3)


async def test_logprobs_come_if_they_are_included(client: AsyncOpenAI, server: Server, worker: PacedWorker) -> None:
    response = await client.responses.create(
        model=server.model, input="Hi", include=["message.output_text.logprobs"], top_logprobs=2
    )
    [message] = response.output
    assert message.type == "message"
    [part] = message.content
    assert part.type == "output_text"
    assert [len(token.top_logprobs) for token in part.logprobs or []] == [2] * 8


ITEMS: list[Fields] = [
    {"role": "developer", "content": "Be brief."},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "One?"}]},
    {"role": "assistant", "content": [{"type": "output_text", "text": "Two.", "annotations": []}], "id": "msg_1"},
    {"role": "user", "content": "Three?"},
]


async def test_items_become_the_conversation(http: httpx.AsyncClient, server: Server, worker: PacedWorker) -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ]
    await http.post(URL, json={"model": server.model, "input": ITEMS})
    await http.post("/v1/chat/completions", json={"model": server.model, "messages": chat})
    as_response, as_chat = [claim.submission.prompt_token_ids for claim in worker.claims]
    assert as_response == as_chat


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": PNG}]}]}, "input.0.content.0"),
        ({"input": [{"type": "computer_call", "id": "x"}]}, "input.0"),
        ({"input": [{"role": "user", "content": 7}]}, "input.0.content"),
        ({"input": []}, "input"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"background": True, "store": False}, "background"),
        ({"previous_response_id": "resp_" + "0" * 32}, "previous_response_id"),
        ({"input": [{"type": "item_reference", "id": "msg_nothing"}]}, "input.0.id"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": 7}}}}, "text.format.schema"),
        ({"messages": []}, "messages"),
        ({"temperature": 101}, "temperature"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
    ],
)
async def test_what_cannot_be_had_is_refused_by_name(
    http: httpx.AsyncClient, server: Server, fields: Fields, param: str
) -> None:
    error = refused(await http.post(URL, json={"model": server.model, "input": "Hi", **fields}))
    if param != "max_output_tokens":
        assert error["param"] == param
    assert param in error["message"]
    assert "messages" not in error["message"] or param == "messages"


async def test_another_model_is_not_found(client: AsyncOpenAI, server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="not served"):
        await client.responses.create(model="gpt-5", input="Hi")


async def test_what_fails_in_a_stream_is_told_there(http: httpx.AsyncClient, server: Server) -> None:
    async with working(server, error=Error(message="It broke.", code="internal_error")):
        events = await streamed(http, server)
        require_whole(events)
        assert events[-1]["response"]["error"] == {"code": "server_error", "message": "It broke."}
        whole = await http.post(URL, json={"model": server.model, "input": "Hi"})
        assert whole.status_code == 500


async def test_a_repetition_is_answered_with_the_first(
    http: httpx.AsyncClient, server: Server, worker: PacedWorker
) -> None:
    body = {"model": server.model, "input": "Hi"}
    first, second = [await http.post(URL, json=body, headers={"Idempotency-Key": "responses"}) for _ in range(2)]
    assert first.json() == second.json()
    assert second.headers["idempotent-replayed"] == "true"
    assert len(worker.claims) == 1
