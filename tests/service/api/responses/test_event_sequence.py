"""The events of a response follow from its log alone, and are what openai's package says they are."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.service.api.responses.openai_events import deltas, require_whole
from tests.service.api.serving import token_logprobs
from tokenrelay.service.api.assistant.deltas import Delta, ReasoningDelta, TextDelta, ToolCallDelta
from tokenrelay.service.api.lifecycle.choices import Output, Step
from tokenrelay.service.api.responses import event_sequence
from tokenrelay.service.api.responses.event_sequence import EventSequence
from tokenrelay.service.api.responses.request import ResponsesRequest
from tokenrelay.service.api.responses.translation import echo
from tokenrelay.service.api.schemas.usage import CompletionUsage, PromptTokensDetails
from tokenrelay.service.api.served_model import ServedModel
from tokenrelay.service.errors import Cancelled, DeadlineExceeded, Unavailable
from tokenrelay.service.terms import AnswerSpec

RELAY_ID = "0123456789abcdef" * 2
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
USAGE = CompletionUsage(
    prompt_tokens=5, completion_tokens=9, total_tokens=14, prompt_tokens_details=PromptTokensDetails(cached_tokens=4)
)


class ScriptedParser:
    """``t:``, ``r:`` and ``c:`` say what a piece of text is; ``C:`` begins a call."""

    def __init__(self, spec: AnswerSpec, relay_id: str, choice: int) -> None:
        self._num_calls = 0

    def feed(self, text: str) -> list[Delta]:
        return [self._delta(*piece.split(":", 1)) for piece in text.split("|") if piece]

    def finish(self) -> list[Delta]:
        return []

    def _delta(self, kind: str, text: str) -> Delta:
        if kind == "t":
            return TextDelta(text)
        if kind == "r":
            return ReasoningDelta(text)
        self._num_calls += kind == "C"
        index = self._num_calls - 1
        return ToolCallDelta(index, f"call_{index}", text, "") if kind == "C" else ToolCallDelta(index, "", "", text)


@pytest.fixture(autouse=True)
def parser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_sequence, "AssistantParser", ScriptedParser)


def new_sequence(model: ServedModel, **fields: Any) -> EventSequence:
    body = ResponsesRequest.model_validate({"model": "m", "input": "Hi", "tools": [TOOL], **fields})
    spec = AnswerSpec(
        route="responses",
        model="m",
        created=1,
        num_prompt_tokens=5,
        num_logprobs=2 if body.tells_logprobs else None,
        extra={"response": echo(body)},
    )
    return EventSequence(spec, model.tokenizer, f"resp_{RELAY_ID}")


def steps(*texts: str, reason: str = "stop") -> list[Step]:
    return [
        Step(i, Output(0, text, [i], [token_logprobs(i, -0.5, 2)], (), reason if i == len(texts) else None), usage)
        for i, text in enumerate(texts, 1)
        for usage in [USAGE if i == len(texts) else None]
    ]


def events_of(sequence: EventSequence, *texts: str, reason: str = "stop") -> list[dict[str, Any]]:
    events = sequence.opening()
    for step in steps(*texts, reason=reason):
        events += sequence.step(step)
    return [json.loads(event.model_dump_json(exclude_unset=True)) for event in events]


def test_a_plain_answer(loaded_model: ServedModel) -> None:
    events = events_of(new_sequence(loaded_model), "t:Hel", "t:lo")
    require_whole(events)
    assert [event["type"].removeprefix("response.") for event in events] == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.delta", "output_text.delta", "output_text.done"),
        *("content_part.done", "output_item.done", "completed"),
    ]
    response = events[-1]["response"]
    assert response["output"][0]["content"][0]["text"] == "Hello"
    assert response["usage"]["input_tokens_details"]["cached_tokens"] == 4
    assert (response["usage"]["input_tokens"], response["usage"]["output_tokens"]) == (5, 9)
    assert events[0]["response"]["usage"] is None


def test_thoughts_an_answer_and_two_calls(loaded_model: ServedModel) -> None:
    events = events_of(
        new_sequence(loaded_model), "r:Let me|r: see", "t:I ask.", "C:weather|c:{", "c:}|C:weather", "c:{}"
    )
    require_whole(events)
    thoughts, message, *calls = events[-1]["response"]["output"]
    assert thoughts["content"] == [{"type": "reasoning_text", "text": "Let me see"}]
    assert message["content"][0]["text"] == "I ask."
    assert [(call["call_id"], call["name"], call["arguments"]) for call in calls] == [
        ("call_0", "weather", "{}"),
        ("call_1", "weather", "{}"),
    ]
    num_reasoning = len(loaded_model.tokenizer.encode("Let me see", add_special_tokens=False))
    assert events[-1]["response"]["usage"]["output_tokens_details"] == {"reasoning_tokens": num_reasoning}


def test_what_is_cut_off_is_incomplete(loaded_model: ServedModel) -> None:
    events = events_of(new_sequence(loaded_model), "t:Hel", "C:weather|c:{", reason="length")
    require_whole(events)
    response = events[-1]["response"]
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]


def test_no_text_at_all_is_an_empty_message(loaded_model: ServedModel) -> None:
    events = events_of(new_sequence(loaded_model), "")
    require_whole(events)
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == ""


def test_a_background_response_begins_in_the_queue(loaded_model: ServedModel) -> None:
    events = events_of(new_sequence(loaded_model, background=True), "t:Hi")
    require_whole(events)
    assert [event["type"] for event in events[:3]] == ["response.created", "response.queued", "response.in_progress"]
    assert [event["response"]["status"] for event in events[:3]] == ["queued", "queued", "in_progress"]


def test_every_token_of_the_answer_is_told_with_its_logprob_once(loaded_model: ServedModel) -> None:
    sequence = new_sequence(loaded_model, include=["message.output_text.logprobs"], top_logprobs=2)
    events = events_of(sequence, "r:Hm", "t:a", "", "t:b", "")
    require_whole(events)
    told = [logprob for event in events if event["type"].endswith("output_text.delta") for logprob in event["logprobs"]]
    part = events[-1]["response"]["output"][1]["content"][0]
    assert part["logprobs"] == told
    assert len(told) == 4  # all but the thought's
    assert len(told[0]["top_logprobs"]) == 2


def test_the_request_is_repeated_in_its_response(loaded_model: ServedModel) -> None:
    fields = {
        **{"instructions": "Be brief.", "max_output_tokens": 7, "metadata": {"a": "b"}, "temperature": 0.5},
        **{"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}}, "user": "me"},
        **{"tool_choice": {"type": "function", "name": "weather"}, "parallel_tool_calls": False, "top_p": 0.9},
    }
    response = events_of(new_sequence(loaded_model, **fields), "t:Hi")[0]["response"]
    for name, value in fields.items():
        assert response[name] == value


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(DeadlineExceeded("too late"), "failed", "server_error"), (Cancelled("given up"), "cancelled", None)],
)
def test_what_fails_says_so_with_what_there_was(
    loaded_model: ServedModel, error: Cancelled, status: str, code: str | None
) -> None:
    sequence = new_sequence(loaded_model)
    events = sequence.opening() + sequence.step(steps("t:Hel", "t:lo")[0]) + sequence.fail(error)
    told = [json.loads(event.model_dump_json()) for event in events]
    require_whole(told)
    assert told[-1]["type"] == "response.failed"
    response = told[-1]["response"]
    assert response["status"] == status
    assert (response["error"] or {}).get("code") == code
    assert response["output"][0]["status"] == "incomplete"
    assert response["output"][0]["content"][0]["text"] == "Hel"


def test_a_server_that_stops_ends_the_stream_and_not_the_response(loaded_model: ServedModel) -> None:
    sequence = new_sequence(loaded_model)
    events = sequence.opening() + sequence.fail(Unavailable("This server is stopping."))
    told = [json.loads(event.model_dump_json()) for event in events]
    require_whole(told)
    assert told[-1]["type"] == "error"
    assert not sequence.ended


PIECES = st.lists(st.sampled_from(["", "t:a", "r:b", "C:weather", "C:weather|c:{}", "t:a|r:b|t:c", "r:b|C:weather"]))


@given(texts=PIECES)
def test_any_text_makes_a_whole_stream(loaded_model: ServedModel, texts: list[str]) -> None:
    events = events_of(new_sequence(loaded_model), *texts, "t:.")
    require_whole(events)
    assert deltas(event for event in events if "output_text" in event["type"]).count("a") == "".join(texts).count("t:a")
