"""A Messages body as a chat completion's: pure, so every rule is one example."""

from __future__ import annotations

from typing import Any

import pytest

from tests.service.api.anthropic.bodies import PLAIN, SWITCHABLE, THINKER, body, chat_fields
from tokenrelay.service.api.anthropic.request import MessagesRequest
from tokenrelay.service.api.anthropic.translation import WORDS, as_chat
from tokenrelay.service.api.assistant.dialect import Dialect
from tokenrelay.service.api.http.body import validate
from tokenrelay.service.api.http.rewording import told_in
from tokenrelay.service.errors import InvalidRequestError, UnsupportedParameter

EPHEMERAL = {"type": "ephemeral"}
USER = {"role": "user", "content": "Hi"}
CALL = {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Köln"}}
TOOL = {"name": "weather", "description": "Tells it.", "input_schema": {"type": "object"}}


def messages(*given: Any, **fields: Any) -> Any:
    return chat_fields(messages=list(given), **fields)["messages"]


def test_the_parameters_have_the_same_meaning_under_other_names() -> None:
    fields = chat_fields(
        max_tokens=9,
        stop_sequences=["a", "b"],
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        stream=True,
        metadata={"user_id": "u"},
    )
    assert fields == {
        "model": "m",
        "messages": [USER],
        "max_tokens": 9,
        "stop": ["a", "b"],
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "stream": True,
        "user": "u",
    }


@pytest.mark.parametrize(
    "hint",
    [
        {"service_tier": "auto"},
        {"service_tier": "standard_only"},
        {"cache_control": EPHEMERAL | {"ttl": "1h"}},
        {"metadata": {"user_id": None}},
        {"output_config": {"effort": "high"}},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]}
            ]
        },
    ],
)
def test_hints_change_nothing(hint: dict[str, Any]) -> None:
    assert chat_fields(**hint) == chat_fields()


def test_the_system_prompt_comes_first_as_text_or_as_blocks() -> None:
    assert messages(USER, system="Be brief.") == [{"role": "system", "content": "Be brief."}, USER]
    blocks = [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]
    assert messages(USER, system=blocks) == [{"role": "system", "content": "Be\nbrief."}, USER]


def test_turns_of_one_side_are_one() -> None:
    assert messages(USER, USER) == [{"role": "user", "content": "Hi\nHi"}]


def test_a_call_and_its_result_become_messages_of_their_own() -> None:
    thought = {"type": "thinking", "thinking": "Ask.", "signature": "s"}
    said = {"role": "assistant", "content": [thought, {"type": "text", "text": "Let me see."}, CALL]}
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "rain"}]}
    told = {"role": "user", "content": [result, {"type": "text", "text": "And now?"}]}
    assert messages(USER, said, told) == [
        USER,
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "Ask.",
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "user", "content": "And now?"},
    ]


def test_a_failed_tool_says_so() -> None:
    result = {"type": "tool_result", "tool_use_id": "c", "content": "no", "is_error": True}
    assert messages({"role": "user", "content": [result]})[0]["content"] == "Error: no"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "any"}, {"tool_choice": "required"}),
        ({"type": "none"}, {"tool_choice": "none"}),
        ({"type": "tool", "name": "weather"}, {"tool_choice": {"type": "function", "function": {"name": "weather"}}}),
        (
            {"type": "auto", "disable_parallel_tool_use": True},
            {"tool_choice": "auto", "parallel_tool_calls": False},
        ),
    ],
)
def test_tools_and_which_of_them(choice: dict[str, Any], expected: dict[str, Any]) -> None:
    fields = chat_fields(tools=[TOOL], tool_choice=choice)
    function = {"name": "weather", "description": "Tells it.", "parameters": {"type": "object"}}
    assert fields["tools"] == [{"type": "function", "function": function}]
    assert {name: fields[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("thinking", "expected"),
    [
        ({"type": "enabled", "budget_tokens": 2048}, {"chat_template_kwargs": {"enable_thinking": True}}),
        ({"type": "disabled"}, {"chat_template_kwargs": {"enable_thinking": False}}),
        (
            {"type": "adaptive", "display": "omitted"},
            {"chat_template_kwargs": {"enable_thinking": True}, "include_reasoning": False},
        ),
    ],
)
def test_thinking_is_the_templates_to_begin(thinking: dict[str, Any], expected: dict[str, Any]) -> None:
    assert chat_fields(SWITCHABLE, thinking=thinking) == chat_fields() | expected


@pytest.mark.parametrize(
    ("dialect", "kind", "possible"),
    [
        (PLAIN, "enabled", False),
        (PLAIN, "adaptive", True),
        (PLAIN, "disabled", True),
        (THINKER, "enabled", True),
        (THINKER, "adaptive", True),
        (THINKER, "disabled", False),
    ],
)
def test_a_model_without_a_switch_is_asked_only_for_what_it_does(dialect: Dialect, kind: str, possible: bool) -> None:
    if possible:
        assert chat_fields(dialect, thinking={"type": kind}) == chat_fields()
    else:
        with pytest.raises(UnsupportedParameter, match="'thinking'"):
            chat_fields(dialect, thinking={"type": kind})


def test_the_last_turn_may_be_the_assistants_to_continue() -> None:
    fields = chat_fields(messages=[USER, {"role": "assistant", "content": "The"}])
    assert fields["continue_final_message"] is True
    assert fields["messages"][-1] == {"role": "assistant", "content": "The"}


def test_an_output_format_is_a_response_format() -> None:
    given = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
    assert chat_fields(output_config=given)["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": {"type": "object"}},
    }


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": [{"type": "mystery"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": [CALL]}]}, "messages"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"mcp_servers": [{"url": "u"}]}, "mcp_servers"),
        ({"n": 2}, "n"),
        ({"stop_sequences": [""]}, "stop_sequences.0"),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_own_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as refusal, told_in(WORDS):
        as_chat(validate(MessagesRequest, body(**fields)), PLAIN)
    assert refusal.value.param == param
    assert f"'{param}'" in refusal.value.message


def test_errors_found_later_are_told_in_the_words_of_the_request() -> None:
    with pytest.raises(InvalidRequestError) as refusal, told_in(WORDS):
        raise InvalidRequestError("'response_format.json_schema.schema': no.", param="tools.0.function.parameters")
    assert (refusal.value.message, refusal.value.param) == (
        "'output_config.format.schema': no.",
        "tools.0.input_schema",
    )
