"""The clients of Anthropic and Ollama, unmodified, against ``tokenrelay serve`` with the real model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import ollama
import pytest
from anthropic import Anthropic

from tests.service.running import LONG, MODEL, RunningService, num_cancelled, wait_until

QUESTION: Any = {"role": "user", "content": "What is the weather in Paris?"}
SCHEMA: Any = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
CLOSED: Any = {**SCHEMA, "additionalProperties": False}
WEATHER: Any = {"name": "weather", "description": "Tells the weather.", "input_schema": SCHEMA}
GREEDY: Any = {"temperature": 0, "top_k": 1}


@pytest.fixture(scope="module")
def claude(service: RunningService) -> Iterator[Anthropic]:
    with Anthropic(base_url=service.url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def llama(service: RunningService) -> Iterator[ollama.Client]:
    with ollama.Client(host=service.url, timeout=60) as client:
        yield client


class TestAnthropic:
    def test_a_streamed_message_is_the_whole_one(self, claude: Anthropic) -> None:
        asked: Any = {"model": MODEL, "max_tokens": 24, "messages": [QUESTION], "extra_body": GREEDY}
        whole = claude.messages.create(**asked)
        with claude.messages.stream(**asked) as stream:
            pieces = list(stream.text_stream)
            streamed = stream.get_final_message()
        assert [block.to_dict() for block in streamed.content] == [block.to_dict() for block in whole.content]
        assert "".join(pieces) == "".join(block.text for block in whole.content if block.type == "text") != ""
        assert (streamed.stop_reason, streamed.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)

    def test_a_stop_sequence_is_told(self, claude: Anthropic) -> None:
        asked: Any = {"model": MODEL, "max_tokens": 64, "messages": [QUESTION], "extra_body": GREEDY}
        [block] = claude.messages.create(**asked).content
        assert block.type == "text"
        stop = block.text[5:12]
        message = claude.messages.create(**asked, stop_sequences=["\x00", stop])
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
        assert message.content[0].to_dict()["text"] == block.text[: block.text.index(stop)]

    def test_a_forced_tool_is_used_with_arguments_of_its_schema_and_its_result_is_read(self, claude: Anthropic) -> None:
        asked: Any = {"model": MODEL, "max_tokens": 99, "tools": [WEATHER], "extra_body": GREEDY}
        choice: Any = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
        message = claude.messages.create(**asked, messages=[QUESTION], tool_choice=choice)
        assert message.stop_reason == "tool_use"
        [call] = message.content
        assert call.type == "tool_use"
        assert (call.name, list(call.input)) == ("weather", ["city"])
        with claude.messages.stream(**asked, messages=[QUESTION], tool_choice=choice) as stream:
            [streamed] = stream.get_final_message().content
        assert streamed.type == "tool_use"
        assert (streamed.name, streamed.input) == (call.name, call.input)
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "Rain."}
        turns = [QUESTION, message.to_param(), {"role": "user", "content": [result]}]
        answer = claude.messages.create(**asked, messages=turns, tool_choice={"type": "none"})
        assert answer.stop_reason in ("end_turn", "max_tokens")
        assert answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0) > 0

    def test_an_answer_keeps_to_a_schema(self, claude: Anthropic) -> None:
        config: Any = {"format": {"type": "json_schema", "schema": CLOSED}}
        asked: Any = {"model": MODEL, "max_tokens": 99, "messages": [QUESTION], "extra_body": GREEDY}
        [block] = claude.messages.create(**asked, output_config=config).content
        assert block.type == "text"
        assert list(json.loads(block.text)) == ["city"]

    def test_a_prefilled_answer_is_continued(self, claude: Anthropic) -> None:
        turns: Any = [{"role": "user", "content": "Count to ten."}, {"role": "assistant", "content": "1, 2, 3,"}]
        message = claude.messages.create(model=MODEL, max_tokens=6, messages=turns, extra_body=GREEDY)
        [block] = message.content
        assert block.type == "text"
        assert block.text.startswith(" 4, 5")

    def test_an_error_is_of_its_class(self, claude: Anthropic) -> None:
        image: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
        with pytest.raises(anthropic.BadRequestError, match="text only"):
            claude.messages.create(model=MODEL, max_tokens=1, messages=[{"role": "user", "content": [image]}])
        with pytest.raises(anthropic.NotFoundError, match="not served"):
            claude.messages.create(model="claude", max_tokens=1, messages=[QUESTION])

    def test_leaving_cancels(self, claude: Anthropic, service: RunningService) -> None:
        before = num_cancelled(service)
        story: Any = {"role": "user", "content": LONG}
        with claude.messages.stream(model=MODEL, max_tokens=2000, messages=[story], extra_body=GREEDY) as stream:
            next(iter(stream.text_stream))
        wait_until(lambda: num_cancelled(service) > before, "the request is cancelled")


class TestOllama:
    def test_a_streamed_chat_is_the_whole_one(self, llama: ollama.Client) -> None:
        options = {"seed": 7, "temperature": 1.0, "num_predict": 24}
        whole = llama.chat(MODEL, [QUESTION], options=options)
        parts = list(llama.chat(f"{MODEL}:latest", [QUESTION], options=options, stream=True))
        assert "".join(part.message.content or "" for part in parts) == whole.message.content != ""
        assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
        assert (parts[-1].done_reason, parts[-1].eval_count) == (whole.done_reason, whole.eval_count)
        assert (whole.total_duration or 0) >= (whole.eval_duration or 0) > 0

    def test_an_answer_keeps_to_a_schema(self, llama: ollama.Client) -> None:
        answer = llama.chat(MODEL, [QUESTION], format=CLOSED, options={"temperature": 0, "num_predict": 99})
        assert list(json.loads(answer.message.content or "")) == ["city"]

    def test_tools_are_offered_and_their_results_read(self, llama: ollama.Client) -> None:
        tool = {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": SCHEMA}}
        answer = llama.chat(MODEL, [QUESTION], tools=[tool], options={"temperature": 0, "num_predict": 64})
        assert answer.done_reason in ("stop", "length")
        call: Any = {"function": {"name": "weather", "arguments": {"city": "Paris"}}}
        turns = [
            QUESTION,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_name": "weather", "content": "Rain."},
        ]
        told = llama.chat(MODEL, turns, tools=[tool], options={"temperature": 0, "num_predict": 16})
        assert (told.prompt_eval_count or 0) > (answer.prompt_eval_count or 0)

    def test_generate_continues_a_raw_prompt(self, llama: ollama.Client) -> None:
        options = {"temperature": 0, "num_predict": 8}
        whole = llama.generate(MODEL, "Once upon a", raw=True, options=options)
        parts = list(llama.generate(MODEL, "Once upon a", raw=True, options=options, stream=True))
        assert "".join(part.response or "" for part in parts) == whole.response != ""

    def test_an_error_is_told(self, llama: ollama.Client) -> None:
        with pytest.raises(ollama.ResponseError, match="not served") as refusal:
            llama.chat("llama3.2", [QUESTION])
        assert refusal.value.status_code == 404
        with pytest.raises(ollama.ResponseError, match=r"options\.num_gpu"):
            llama.chat(MODEL, [QUESTION], options={"num_gpu": 1})

    def test_leaving_cancels(self, service: RunningService) -> None:
        cancelled = 'tokenrelay_requests_total{model_name="smollm2-135m-instruct",outcome="cancelled"}'
        before = service.metrics().get(cancelled, 0)
        body = {"model": MODEL, "prompt": "Count.", "raw": True, "options": {"num_predict": 2000}}
        with httpx.stream("POST", f"{service.url}/api/generate", json=body, timeout=60) as response:
            next(response.iter_lines())
        wait_until(lambda: num_cancelled(service) > before, "the request is cancelled")
