"""litellm and langchain-openai against the whole service: chat, stream, tools, schema, error, end."""

from __future__ import annotations

import json
import warnings
from types import ModuleType
from typing import Any

import pytest
from jsonschema import validate

from tests.service.running import MODEL, RunningService, wait_until
from tests.service.test_openai_client import FORMAT, NAMED, SCHEMA, TOOLS, in_flight

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]


def imported(name: str) -> ModuleType:
    """Clients that warn while they are imported are none of our affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: ModuleType = pytest.importorskip(name)
        return module


class TestLiteLLM:
    @pytest.fixture
    def ask(self, service: RunningService) -> dict[str, Any]:
        return {
            "model": f"openai/{MODEL}",
            "api_base": f"{service.url}/v1",
            "api_key": "none",
            "messages": QUESTION,
            "temperature": 0,
            "max_tokens": 200,
            "max_retries": 0,
        }

    @pytest.fixture
    def litellm(self) -> Any:
        return imported("litellm")

    def test_chat_and_stream(self, litellm: Any, ask: dict[str, Any]) -> None:
        answer = litellm.completion(**ask)
        assert "Paris" in answer.choices[0].message.content
        pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**ask, stream=True)]
        assert "".join(pieces) == answer.choices[0].message.content

    @pytest.mark.parametrize("choice", ["required", NAMED])
    def test_tools(self, litellm: Any, ask: dict[str, Any], choice: Any) -> None:
        answer = litellm.completion(**ask, tools=TOOLS, tool_choice=choice)
        assert answer.choices[0].finish_reason == "tool_calls"
        for call in answer.choices[0].message.tool_calls:
            validate(json.loads(call.function.arguments), SCHEMA)
        chunks = list(litellm.completion(**ask, tools=TOOLS, tool_choice=choice, stream=True))
        built = litellm.stream_chunk_builder(chunks, messages=QUESTION)
        for call in built.choices[0].message.tool_calls:
            assert call.function.name == "get_weather"
            validate(json.loads(call.function.arguments), SCHEMA)

    def test_schema(self, litellm: Any, ask: dict[str, Any]) -> None:
        answer = litellm.completion(**ask, response_format=FORMAT)
        validate(json.loads(answer.choices[0].message.content), SCHEMA)

    def test_error(self, litellm: Any, ask: dict[str, Any]) -> None:
        with pytest.raises(litellm.BadRequestError, match="tool_choice"):
            litellm.completion(**ask, tool_choice="required")
        with pytest.raises(litellm.NotFoundError):
            litellm.completion(**ask | {"model": "openai/gpt-4o"})

    def test_cancel(self, litellm: Any, ask: dict[str, Any], service: RunningService) -> None:
        stream = litellm.completion(**ask | {"max_tokens": 1500}, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.completion_stream.close()
        wait_until(lambda: in_flight(service) == 0, "the request has ended")


class TestLangChain:
    @pytest.fixture
    def langchain(self) -> Any:
        return imported("langchain_openai")

    @pytest.fixture
    def chat(self, langchain: Any, service: RunningService) -> Any:
        return langchain.ChatOpenAI(
            model=MODEL,
            base_url=f"{service.url}/v1",
            api_key="none",
            temperature=0,
            max_tokens=200,
            max_retries=0,
        )

    def test_chat_and_stream(self, chat: Any) -> None:
        answer = chat.invoke(QUESTION)
        assert "Paris" in answer.content
        assert answer.response_metadata["finish_reason"] == "stop"
        assert "".join(chunk.content for chunk in chat.stream(QUESTION)) == answer.content

    def test_tools(self, chat: Any) -> None:
        bound = chat.bind_tools(TOOLS, tool_choice="get_weather")
        message = bound.invoke(QUESTION)
        assert message.invalid_tool_calls == []
        for call in message.tool_calls:
            assert call["name"] == "get_weather"
            validate(call["args"], SCHEMA)
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "warm"} for call in message.tool_calls]
        assert chat.bind_tools(TOOLS).invoke([*QUESTION, message, *results]).response_metadata["finish_reason"]
        streamed = None
        for chunk in chat.bind_tools(TOOLS, tool_choice="any").stream(QUESTION):
            streamed = chunk if streamed is None else streamed + chunk
        assert streamed is not None
        assert streamed.tool_calls
        for call in streamed.tool_calls:
            validate(call["args"], SCHEMA)

    @pytest.mark.parametrize("method", ["json_schema", "function_calling"])
    def test_schema(self, chat: Any, method: str) -> None:
        shaped = chat.with_structured_output({**SCHEMA, "title": "trip", "description": "A trip."}, method=method)
        validate(shaped.invoke(QUESTION), SCHEMA)

    def test_error(self, chat: Any) -> None:
        openai = imported("openai")
        with pytest.raises(openai.BadRequestError, match="tool_choice"):
            chat.invoke(QUESTION, tool_choice="required")
        with pytest.raises(openai.NotFoundError):
            chat.invoke(QUESTION, model="gpt-4o")

    def test_cancel(self, chat: Any, service: RunningService) -> None:
        stream = chat.stream(QUESTION, max_tokens=1500, extra_body={"ignore_eos": True})
        next(stream)
        stream.close()
        wait_until(lambda: in_flight(service) == 0, "the request has ended")
