"""Templates in the manner of each family's render as transformers renders them; no template runs without an end."""

from __future__ import annotations

import time
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tokenrelay.model.chat_template import ChatTemplate, ChatTemplateError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
USER, ASSISTANT = {"role": "user", "content": " Hi there\n"}, {"role": "assistant", "content": "Grüße <3 & 'you'"}
SYSTEM, AGAIN = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "And {now}? "}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "days": [1, 2]}}}
    ],
}
RESULT = {"role": "tool", "name": "weather", "content": '{"sky": "blue"}'}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Says <it>.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n"
        "{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama 2": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
        "{% set first = messages[0]['content'] %}"
        "{% else %}{% set rest = messages %}{% set first = false %}{% endif %}{% for m in rest %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) and m.role != 'tool' %}"
        "{{ raise_exception('Take turns.') }}"
        "{% endif %}{% if loop.index0 == 0 and first != false %}"
        "{% set text = '<<SYS>>\n' + first + '\n<</SYS>>\n\n' + "
        "m['content'] %}{% else %}{% set text = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}{% else %}"
        "{{ ' ' + (text or '') | trim + ' ' + eos_token }}"
        "{% endif %}{% endfor %}"
    ),
    "llama 3": (
        "{{- bos_token }}\n{%- if not date_string is defined %}\n  {%- set date_string = '26 Jul 2024' %}\n"
        "{%- endif %}\n"
        "{%- if tools is not none %}\n  {{- 'Tools: ' }}\n  {%- for t in tools %}\n    {{- t | tojson(indent=4) }}\n"
        "    {{- '\\n\\n' }}\n  {%- endfor %}\n{%- endif %}\n{{- 'Today: ' ~ date_string ~ '\\n' }}\n"
        "{%- for m in messages %}\n  {%- if 'tool_calls' in m %}\n    {%- if not m.tool_calls | length == 1 %}\n"
        "      {{- raise_exception('One call at a time.') }}\n    {%- endif %}\n"
        "    {%- set call = m.tool_calls[0].function %}\n"
        "    {{- '{\"name\": \"' + call.name + '\", \"parameters\": ' }}{{- call.arguments | tojson }}{{- '}' }}\n"
        "  {%- else %}\n    {{- '<|start|>' + m['role'] + '<|end|>\\n\\n' + m['content'] | trim + '<|eot|>' }}\n"
        "  {%- endif %}\n{%- endfor %}\n"
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}"
        "{% set role = m['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + (m['content'] or '') | trim }}"
        "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "qwen 3": (
        "{%- set ns = namespace(last=messages | length - 1, searching=true) %}{%- for m in messages[::-1] %}"
        "{%- set index = messages | length - 1 - loop.index0 %}{%- if ns.searching and m.role == 'user' %}"
        "{%- set ns.searching = false %}{%- set ns.last = index %}{%- endif %}{%- endfor %}{%- for m in messages %}"
        "{%- generation %}{{- m.role ~ loop.index ~ '/' ~ loop.length ~ (' *' if loop.index0 > ns.last else '') }}"
        "{%- endgeneration %}{%- if m.tool_calls %}{%- for c in m.tool_calls %}{%- if c.function %}"
        "{%- set c = c.function %}{%- endif %}{{- '<tool_call>' }}{{- c.arguments if c.arguments is string else "
        "c.arguments | tojson }}{%- endfor %}{%- endif %}{{- '\\n' }}{%- endfor %}"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think></think>' }}{%- endif %}"
    ),
    "gpt-oss": (
        "{%- macro typed(name, spec) -%}{{ name }}: {{ spec.type | upper }}"
        "{{ '' if spec.enum else '!' }}{%- endmacro -%}"
        "{%- for t in tools or [] %}{%- for key, spec in t.function.parameters.properties | dictsort %}"
        "{{- typed(key, spec) }}{%- if not loop.last %}, {% endif %}{%- endfor %}{%- endfor %}{%- for m in messages %}"
        "{%- if m.role == 'system' %}{% continue %}{%- endif %}{%- if loop.index > 3 %}{% break %}{%- endif %}"
        "{{- '<|start|>%s<|message|>' | format(m.role) }}{{- m.content }}{%- endfor %}"
    ),
    "granite": (
        "{%- set names = messages | map(attribute='role') | unique | join(',') %}{{- names }}"
        "{%- for m in messages | selectattr('role', 'ne', 'tool') | list %}{{- '\\n' * loop.index }}"
        "{{- (m.content or 'none').split(' ') | reverse | join(' ') | replace('i', 'I') }}{%- endfor %}"
        "{%- call(x) twice('!') %}{{ x }}{%- endcall %}{%- macro unused() %}{% endmacro %}"
    ).replace(
        "{%- call(x) twice('!') %}{{ x }}{%- endcall %}",
        "{%- set t = 'a' ~ 1 %}{% filter upper %}{{ t }}{% endfilter %}",
    ),
}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, ASSISTANT, AGAIN],
    "tools": [USER, CALL, RESULT],
}


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_it_renders_as_transformers_does(
    template: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> None:
    reference = PreTrainedTokenizerFast(tokenizer_object=Backend(BPE()), chat_template=template, **SPECIAL)
    for prompted in (True, False):
        options: dict[str, Any] = {"add_generation_prompt": prompted, "tools": tools}
        try:
            expected = reference.apply_chat_template(messages, tokenize=False, **options)
        except Exception:
            with pytest.raises(ChatTemplateError):
                ChatTemplate(template, SPECIAL).render(messages, **options)
        else:
            assert ChatTemplate(template, SPECIAL).render(messages, **options) == expected


ENDLESS = {
    "nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "calls without a loop": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "a call of itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a recursive loop": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "doubling by ~": "{% set n = namespace(s='x') %}{% for a in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubling by +": "{% set n = namespace(s='x') %}{% for a in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "doubling by replace": "{% set n = namespace(s='x') %}{% for a in range(60) %}"
    "{% set n.s = n.s.replace('x', 'xx') %}{% endfor %}",
    "a filter's replace": "{% set s = 'x' * 99999 %}{{ s | replace('x', s) }}",
    "a long text": "{{ 'x' * 10 ** 10 }}",
    "a long list": "{{ [1] * 10 ** 10 }}",
    "a high power": "{{ 9 ** 9 ** 9 }}",
    "a width": "{{ 'x'.ljust(10000000000) }}",
    "a width in a format": "{{ '%10000000000d' % 1 }}",
    "another format's": "{{ '{:>10000000000}'.format(1) }}",
    "a centre": "{{ 'x' | center(10000000000) }}",
    "many literals": "{% for a in range(99999) %}" + "x" * 9999 + "{% endfor %}",
    "a block of them": "{% set t %}{% for a in range(99999) %}" + "x" * 9999 + "{% endfor %}{% endset %}",
    "joined again and again": "{% set s = ['x' * 99999] * 99999 %}{{ s | join }}",
}


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_what_would_not_end_or_fill_memory_is_stopped(template: str) -> None:
    started = time.process_time()
    with pytest.raises(ChatTemplateError, match=r"steps|characters|power|recursive|recursion"):
        ChatTemplate(template, {}).render([USER])
    assert time.process_time() - started < 20


def test_a_long_conversation_is_far_from_the_bounds() -> None:
    messages = [USER, ASSISTANT] * 2000
    assert len(ChatTemplate(TEMPLATES["qwen 3"], SPECIAL).render(messages)) > 40_000
