"""Ollama's bodies in our words: pure, so every rule is one example."""

from __future__ import annotations

from typing import Any

import pytest

from tests.service.api.anthropic.bodies import PLAIN, SWITCHABLE, THINKER
from tokenrelay.service.api.assistant.dialect import Dialect
from tokenrelay.service.api.http.body import validate
from tokenrelay.service.api.http.rewording import told_in
from tokenrelay.service.api.ollama.request import OllamaChatRequest, OllamaGenerateRequest
from tokenrelay.service.api.ollama.translation import (
    WORDS,
    chat_fields,
    chat_of,
    generation_fields,
    named,
    raw_of,
)
from tokenrelay.service.errors import InvalidRequestError, UnsupportedParameter

USER = {"role": "user", "content": "Hi"}
DEFAULTS = {"model": "m", "messages": [USER], "stream": True, "timings_per_token": True}


def chat(dialect: Dialect = PLAIN, **fields: Any) -> dict[str, Any]:
    return chat_fields(validate(OllamaChatRequest, {"model": "m", "messages": [USER], **fields}), "m", dialect)


def test_it_streams_unless_told_otherwise() -> None:
    assert chat() == DEFAULTS
    assert chat(stream=False) == DEFAULTS | {"stream": False}


def test_options_have_the_same_meaning_under_our_names() -> None:
    same = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "stop": ["a"], "repeat_penalty": 1.1, "seed": 7}
    assert chat(options={**same, "num_predict": 9}) == DEFAULTS | same | {"max_tokens": 9}


@pytest.mark.parametrize(
    "hint",
    [
        {"keep_alive": "5m"},
        {"keep_alive": -1},
        {"options": {}},
        {"options": {"num_ctx": 512, "seed": -1, "num_predict": -1, "num_keep": 0, "repeat_last_n": -1}},
        {"format": ""},
        {"think": False},
        {"tools": []},
    ],
)
def test_what_asks_for_nothing_changes_nothing(hint: dict[str, Any]) -> None:
    assert chat(**hint) == DEFAULTS


def test_formats() -> None:
    assert chat(format="json")["response_format"] == {"type": "json_object"}
    schema = {"type": "object"}
    expected = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    assert chat(format=schema)["response_format"] == expected


def test_results_find_their_calls_without_ids() -> None:
    calls = [{"function": {"name": name, "arguments": {"x": 1}}} for name in ("f", "g")]
    messages = chat(
        messages=[
            USER,
            {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": calls},
            {"role": "tool", "tool_name": "g", "content": "2"},
            {"role": "tool", "content": "1"},
        ]
    )["messages"]
    _, assistant, second, first = messages
    assert assistant["reasoning_content"] == "Hm."
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in assistant["tool_calls"]] == [
        ("f", '{"x": 1}'),
        ("g", '{"x": 1}'),
    ]
    ids = [call["id"] for call in assistant["tool_calls"]]
    assert len(set(ids)) == 2
    assert [first["tool_call_id"], second["tool_call_id"]] == ids


@pytest.mark.parametrize(
    ("dialect", "think", "expected"),
    [
        (SWITCHABLE, True, {"chat_template_kwargs": {"enable_thinking": True}}),
        (SWITCHABLE, False, {"chat_template_kwargs": {"enable_thinking": False}}),
        (SWITCHABLE, "high", {"chat_template_kwargs": {"enable_thinking": True}}),
        (THINKER, True, {}),
        (PLAIN, False, {}),
    ],
)
def test_thinking_is_the_templates_to_begin(dialect: Dialect, think: Any, expected: dict[str, Any]) -> None:
    assert chat(dialect, think=think) == DEFAULTS | expected


def test_a_model_that_does_not_think_is_not_asked_to() -> None:
    with pytest.raises(UnsupportedParameter, match="'think'"):
        chat(PLAIN, think=True)


def test_a_prompt_is_a_message_of_the_user() -> None:
    body = validate(OllamaGenerateRequest, {"model": "m", "prompt": "Hi", "system": "Be brief."})
    assert generation_fields(body, "m", PLAIN) == DEFAULTS | {
        "messages": [{"role": "system", "content": "Be brief."}, USER]
    }


def test_a_raw_prompt_is_continued_as_far_as_there_is_room() -> None:
    fields = {"model": "m", "prompt": "Hi", "raw": True}
    assert raw_of(validate(OllamaGenerateRequest, fields), "m", most=64).max_tokens == 64
    limited = validate(OllamaGenerateRequest, fields | {"options": {"num_predict": 3}})
    assert raw_of(limited, "m", most=64).max_tokens == 3


@pytest.mark.parametrize(
    ("asked", "served", "expected"),
    [("m", "m", "m"), ("m:latest", "m", "m"), ("m", "m:latest", "m:latest"), ("m:8b", "m", "m:8b"), ("x", "m", "x")],
)
def test_the_default_tag_says_nothing(asked: str, served: str, expected: str) -> None:
    assert named(asked, served) == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"options": {"num_gpu": 1}}, "options.num_gpu"),
        ({"options": {"mirostat": 1}}, "options.mirostat"),
        ({"options": {"temperature": -1}}, "options.temperature"),
        ({"options": {"num_predict": 0}}, "options.num_predict"),
        ({"options": {"colour": "red"}}, "options.colour"),
        ({"messages": [USER | {"images": ["aGk="]}]}, "messages.0.images"),
        ({"format": "yaml"}, "format"),
        ({"template": "{{ .Prompt }}"}, "template"),
        ({"top_logprobs": 3}, "top_logprobs"),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_own_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as refusal, told_in(WORDS):
        chat_of(validate(OllamaChatRequest, {"model": "m", "messages": [USER], **fields}), "m", PLAIN)
    assert refusal.value.param == param
    assert f"'{param}'" in refusal.value.message


@pytest.mark.parametrize("field", ["template", "suffix", "context", "images"])
def test_what_generate_does_not_build_is_refused_by_name(field: str) -> None:
    with pytest.raises(UnsupportedParameter, match=f"'{field}'"):
        validate(OllamaGenerateRequest, {"model": "m", "prompt": "p", field: ["x"]})
