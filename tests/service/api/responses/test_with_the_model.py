"""Tools, structure and a conversation with the real model, in the whole service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.service.api.responses.openai_events import require_whole
from tests.service.running import RunningService

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "name": "weather", "description": "Of a city.", "parameters": CITY, "strict": True}
QUESTION = "What is the weather in Rome?"


@pytest.fixture
def client(service: RunningService) -> Iterator[openai.OpenAI]:
    with service.client() as client:
        yield client


@pytest.fixture(scope="module")
def model(service: RunningService) -> str:
    with service.client() as client:
        return client.models.list().data[0].id


def test_a_function_is_called_and_its_output_answered(client: openai.OpenAI, model: str) -> None:
    asked = client.responses.create(
        model=model,
        input=QUESTION,
        tools=[WEATHER],
        tool_choice={"type": "function", "name": "weather"},
        parallel_tool_calls=False,
        temperature=0,
    )
    [call] = asked.output
    assert call.type == "function_call"
    assert call.name == "weather"
    assert json.loads(call.arguments)["city"] in ("Oslo", "Rome")
    output: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    answered = client.responses.create(
        model=model, input=output, previous_response_id=asked.id, tools=[WEATHER], tool_choice="none", temperature=0
    )
    assert answered.output_text
    kinds = [item.type for item in client.responses.input_items.list(answered.id, order="asc")]
    assert kinds == ["message", "function_call", "function_call_output"]


def test_a_call_is_streamed(client: openai.OpenAI, model: str) -> None:
    allowed: Any = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]}
    stream = client.responses.create(
        model=model,
        input=QUESTION,
        tools=[WEATHER],
        tool_choice=allowed,
        parallel_tool_calls=False,
        stream=True,
    )
    events = [event.to_dict(mode="json") for event in stream]
    require_whole(events)
    [call] = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert json.loads(call["arguments"])["city"] in ("Oslo", "Rome")  # type: ignore[arg-type]


def test_a_schema_is_kept(client: openai.OpenAI, model: str) -> None:
    text: Any = {"format": {"type": "json_schema", "name": "place", "schema": CITY, "strict": True}}
    response = client.responses.create(model=model, input=QUESTION, text=text)
    assert json.loads(response.output_text)["city"] in ("Oslo", "Rome")


def test_what_the_tools_lack_is_told_in_this_protocols_words(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.responses.create(model=model, input="Hi", tools=[WEATHER], tool_choice={"type": "function", "name": "x"})
    assert refusal.value.param == "tool_choice"
    bad: Any = {**WEATHER, "name": "not a name"}
    with pytest.raises(openai.BadRequestError) as refusal:
        client.responses.create(model=model, input="Hi", tools=[bad])
    assert refusal.value.param == "tools.0.name"


def test_thoughts_and_calls_of_an_earlier_turn_are_taken(client: openai.OpenAI, model: str) -> None:
    items: Any = [
        {"role": "user", "content": QUESTION},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "function_call", "call_id": "c", "name": "weather", "arguments": '{"city":"Rome"}', "id": "fc_1"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "sunny"}]},
    ]
    response = client.responses.create(model=model, input=items, tools=[WEATHER], tool_choice="none", temperature=0)
    assert response.status == "completed"
    assert response.output_text
