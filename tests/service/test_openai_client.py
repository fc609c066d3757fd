"""openai's client in its three ways, against the whole service: chat, stream, tools, schema, error, end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from jsonschema import validate
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageFunctionToolCall

from tests.service.running import MODEL, RunningService, wait_until

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}
ASK: Any = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
    "max_tokens": 200,
}
LONG: Any = ASK | {"max_tokens": 1500, "extra_body": {"ignore_eos": True}}


@pytest.fixture
async def patient(service: RunningService) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def in_flight(service: RunningService) -> float:
    return service.metric("tokenrelay_requests_in_flight")


class TestSync:
    def test_chat_and_stream_say_the_same(self, client: OpenAI) -> None:
        answer = client.chat.completions.create(**ASK)
        chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == answer.choices[0].message.content
        assert "Paris" in text
        assert chunks[-1].usage is not None
        assert answer.usage is not None
        assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
        assert {chunk.system_fingerprint for chunk in chunks} == {answer.system_fingerprint}

    @pytest.mark.parametrize("choice", ["required", NAMED])
    def test_a_forced_call_is_valid_and_its_result_is_read(self, client: OpenAI, choice: Any) -> None:
        answer = client.chat.completions.create(**ASK, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
        message = answer.choices[0].message
        assert (answer.choices[0].finish_reason, message.content) == ("tool_calls", None)
        [call] = message.tool_calls or []
        assert isinstance(call, ChatCompletionMessageFunctionToolCall)
        assert call.function.name == "get_weather"
        validate(json.loads(call.function.arguments), SCHEMA)
        result: Any = {"role": "tool", "tool_call_id": call.id, "content": '{"celsius": 21}'}
        history = [*ASK["messages"], message, result]
        told = client.chat.completions.create(**ASK | {"messages": history, "max_tokens": 8}, tools=TOOLS)
        assert told.choices[0].finish_reason in ("stop", "length", "tool_calls")
        assert told.usage is not None
        assert answer.usage is not None
        assert told.usage.prompt_tokens > answer.usage.prompt_tokens

    def test_a_forced_call_streams(self, client: OpenAI) -> None:
        with client.chat.completions.stream(**ASK, tools=TOOLS, tool_choice="required") as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_completion()
        assert "tool_calls.function.arguments.delta" in kinds
        calls = final.choices[0].message.tool_calls or []
        assert calls
        for call in calls:
            validate(json.loads(call.function.arguments), SCHEMA)

    def test_a_schema_is_kept(self, client: OpenAI) -> None:
        answer = client.chat.completions.create(**ASK, response_format=FORMAT)
        validate(json.loads(answer.choices[0].message.content or ""), SCHEMA)

    def test_an_error_is_its_own_exception(self, client: OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**ASK, tool_choice="required")
        assert refused.value.param == "tool_choice"

    def test_leaving_ends_the_request(self, service: RunningService, client: OpenAI) -> None:
        with client.chat.completions.create(**LONG, stream=True) as stream:
            next(iter(stream))
        wait_until(lambda: in_flight(service) == 0, "the request has ended")


class TestAsync:
    async def test_chat_stream_tools_and_schema(self, patient: AsyncOpenAI) -> None:
        answer = await patient.chat.completions.create(**ASK)
        stream = await patient.chat.completions.create(**ASK, stream=True)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(pieces) == answer.choices[0].message.content
        called = await patient.chat.completions.create(**ASK, tools=TOOLS, tool_choice=NAMED)
        for call in called.choices[0].message.tool_calls or [None]:
            assert isinstance(call, ChatCompletionMessageFunctionToolCall)
            validate(json.loads(call.function.arguments), SCHEMA)
        shaped = await patient.chat.completions.create(**ASK, response_format=FORMAT)
        validate(json.loads(shaped.choices[0].message.content or ""), SCHEMA)

    async def test_error_and_cancel(self, service: RunningService, patient: AsyncOpenAI) -> None:
        with pytest.raises(openai.NotFoundError):
            await patient.chat.completions.create(**ASK | {"model": "gpt-4o"})
        asking = asyncio.create_task(patient.chat.completions.create(**LONG))
        await asyncio.to_thread(wait_until, lambda: in_flight(service) == 1, "the request runs")
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.to_thread(wait_until, lambda: in_flight(service) == 0, "the request has ended")


class TestRaw:
    def test_headers_and_lines(self, service: RunningService, client: OpenAI) -> None:
        with client.chat.completions.with_streaming_response.create(**ASK, stream=True) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            assert response.headers["x-request-id"]
            lines = [line for line in response.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        texts = [json.loads(line[6:])["choices"][0]["delta"].get("content") or "" for line in lines[:-1]]
        raw = client.chat.completions.with_raw_response.create(**ASK)
        assert raw.parse().choices[0].message.content == "".join(texts)

    def test_tools_schema_error_and_end(self, service: RunningService, client: OpenAI) -> None:
        raw = client.chat.completions.with_raw_response.create(**ASK, tools=TOOLS, tool_choice="required")
        assert json.loads(raw.text)["choices"][0]["finish_reason"] == "tool_calls"
        with client.chat.completions.with_streaming_response.create(**ASK, response_format=FORMAT) as response:
            validate(json.loads(response.parse().choices[0].message.content or ""), SCHEMA)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.with_raw_response.create(**ASK | {"temperature": -1})
        with client.chat.completions.with_streaming_response.create(**LONG, stream=True) as response:
            next(response.iter_lines())
        wait_until(lambda: in_flight(service) == 0, "the request has ended")
