"""Prompts of chats with tools are transformers' own, for templates in the style of three families."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from tokenrelay.model.chat_template import ChatTemplate, ChatTemplateError
from tokenrelay.service.api.assistant.dialect import Dialect
from tokenrelay.service.api.assistant.prompt import template_arguments
from tokenrelay.service.api.assistant.reasoning import detected_reasoning_format
from tokenrelay.service.api.assistant.tool_formats import detected_tool_format
from tokenrelay.service.api.schemas.chat import ChatCompletionRequest
from tokenrelay.service.errors import UnsupportedParameter

LIKE_QWEN = """
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}# Tools
{%- for tool in tools %}

{{ tool | tojson }}
{%- endfor %}

Answer within <tool_call></tool_call>.<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' and message.tool_calls %}<|im_start|>assistant
{%- if message.content %}
{{ message.content }}
{%- endif %}
{%- for call in message.tool_calls %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% elif message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% elif not (tools and loop.first and message.role == 'system') %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""

LIKE_LLAMA = """
{%- macro turn(role) %}<|start_header_id|>{{ role }}<|end_header_id|>

{% endmacro -%}
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'user' and loop.index0 == 0 and tools is not none %}{{ turn('user') }}Given these functions:
{%- for tool in tools %}

{{ tool | tojson(indent=4) }}
{%- endfor %}

{{ message['content'] | trim }}<|eot_id|>
{%- elif 'tool_calls' in message %}
{%- if not message.tool_calls | length == 1 %}{{ raise_exception("This model makes single calls!") }}{% endif %}
{%- set function = message.tool_calls[0].function %}
{{- turn('assistant') }}{"name": "{{ function.name }}", "parameters": {{ function.arguments | tojson }}}<|eot_id|>
{%- elif message.role == 'tool' %}{{ turn('ipython') }}{{ message.content | tojson }}<|eot_id|>
{%- else %}{{ turn(message.role) }}{{ message['content'] | trim }}<|eot_id|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ turn('assistant') }}{% endif %}"""

LIKE_MISTRAL = """
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'user' %}
{%- if tools is not none and loop.index0 == 0 %}[AVAILABLE_TOOLS] [
{%- for tool in tools %}{{ tool | tojson }}{{ ', ' if not loop.last }}{% endfor %}][/AVAILABLE_TOOLS]{% endif %}
{{- '[INST] ' + message.content + '[/INST]' }}
{%- elif message.tool_calls is defined and message.tool_calls is not none %}[TOOL_CALLS] [
{%- for call in message.tool_calls %}
{%- if call.id is not defined or call.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}
{%- endfor %}]{{ eos_token }}
{%- elif message.role == 'tool' %}
{%- if message.tool_call_id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}
[TOOL_RESULTS] {"content": {{ message.content }}, "call_id": "{{ message.tool_call_id }}"}[/TOOL_RESULTS]
{%- else %}{{ ' ' + message.content + eos_token }}
{%- endif %}
{%- endfor %}"""

TEMPLATES = {"hermes": LIKE_QWEN, "llama3": LIKE_LLAMA, "mistral": LIKE_MISTRAL}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city, in °C",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"id": "a1B2c3D4e", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich"}}}
USER = {"role": "user", "content": " Is it <warm> in Zürich? "}
CHATS: dict[str, list[dict[str, Any]]] = {
    "question": [USER],
    "call and result": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "a1B2c3D4e", "content": '{"celsius": 20}'},
    ],
    "answer": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "a1B2c3D4e", "content": '{"celsius": 20}'},
        {"role": "assistant", "content": "20 °C."},
        USER,
    ],
}


def dialect_of(template: str) -> Dialect:
    variables = ChatTemplate(template, SPECIAL).variables
    tool_format, reasoning = detected_tool_format(template), detected_reasoning_format(template)
    return Dialect(tool_format, reasoning, "tools" in variables, False, variables, {})


def as_sent(message: dict[str, Any]) -> dict[str, Any]:
    """As a client writes it: arguments are text."""
    calls = [
        call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls", [])
    ]
    return message | ({"tool_calls": calls, "content": None} if calls else {})


def rendered(template: str, messages: list[dict[str, Any]], **fields: Any) -> str:
    body = ChatCompletionRequest.model_validate(
        {"model": "m", "messages": [as_sent(message) for message in messages], **fields}
    )
    return ChatTemplate(template, SPECIAL).render(**template_arguments(body, dialect_of(template)))


def reference(template: str, messages: list[dict[str, Any]], **fields: Any) -> str:
    [text], _ = render_jinja_template([messages], chat_template=template, **SPECIAL, **fields)
    return str(text)


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("tools", [None, [TOOL], [TOOL, {"type": "function", "function": {"name": "now"}}]])
def test_prompts_are_those_of_transformers(family: str, chat: str, tools: list[dict[str, Any]] | None) -> None:
    template, messages = TEMPLATES[family], CHATS[chat]
    ours = rendered(template, messages, **({"tools": tools} if tools else {}))
    assert ours == reference(template, messages, tools=tools, add_generation_prompt=True)
    assert "Zürich" in ours


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_family_is_detected(family: str) -> None:
    assert dialect_of(TEMPLATES[family]).tool_format == family


def test_ids_of_clients_become_those_that_the_template_takes() -> None:
    call = CALL | {"id": "call_123456"}
    messages: list[dict[str, Any]] = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_123456", "content": "{}"},
    ]
    assert rendered(LIKE_MISTRAL, messages).count('id": "') == 2
    with pytest.raises(TemplateError, match="nine"):
        reference(LIKE_MISTRAL, messages)


def test_what_a_template_refuses_is_told_in_its_words() -> None:
    messages: list[dict[str, Any]] = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}]
    with pytest.raises(ChatTemplateError, match="makes single calls"):
        rendered(LIKE_LLAMA, messages)


def test_arguments_of_the_template() -> None:
    prompt = rendered(LIKE_QWEN, [USER], chat_template_kwargs={"enable_thinking": False})
    assert prompt == reference(LIKE_QWEN, [USER], add_generation_prompt=True, enable_thinking=False)
    assert prompt.endswith("</think>\n\n")
    assert rendered(LIKE_QWEN, [USER], reasoning_effort="none") == prompt
    for fields in ({"chat_template_kwargs": {"tokenize": True}}, {"reasoning_effort": "low"}):
        with pytest.raises(UnsupportedParameter):
            rendered(LIKE_QWEN, [USER], **fields)
    assert rendered("{{ messages[0].content }}{{ reasoning_effort }}", [USER], reasoning_effort="low").endswith("low")


def test_earlier_reasoning_is_shown_to_templates_that_know_it() -> None:
    for name in ("reasoning", "reasoning_content"):
        prompt = rendered(LIKE_QWEN, [USER, {"role": "assistant", "content": "Yes.", name: "It is May."}, USER])
        assert "<think>\nIt is May.\n</think>\n\nYes." in prompt


def test_a_message_that_is_continued_ends_the_prompt() -> None:
    begun = [USER, {"role": "assistant", "content": "It is "}]
    assert rendered(LIKE_QWEN, begun, continue_final_message=True).endswith("<|im_start|>assistant\nIt is ")
    with pytest.raises(ChatTemplateError, match="does not write the last message"):
        rendered("{{ messages[0].content }}", begun, continue_final_message=True)


def test_a_template_may_want_tools_in_the_system_message() -> None:
    template = "{% for m in messages %}{% if 'tools' in m %}<|tool|>{{ m['tools'] }}<|/tool|>{% endif %}{% endfor %}"
    dialect = Dialect("phi4", "", True, True, frozenset({"messages"}), {})
    body = ChatCompletionRequest.model_validate({"model": "m", "messages": [USER], "tools": [TOOL]})
    prompt = ChatTemplate(template, {}).render(**template_arguments(body, dialect))
    assert prompt == f"<|tool|>{json.dumps([TOOL], ensure_ascii=False)}<|/tool|>"
