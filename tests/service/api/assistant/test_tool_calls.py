"""Calls of tools in the forms that families of models write them in."""

from __future__ import annotations

import json

import pytest

from tests.service.api.assistant.parsing import call, new_parser, parsed
from tokenrelay.service.api.assistant.deltas import Delta, TextDelta, ToolCallDelta
from tokenrelay.service.api.assistant.tool_call_parser import short_id
from tokenrelay.service.api.assistant.tool_formats import FORMATS, detected_tool_format

ARGUMENTS = '{"city": "Par\\"is}", "days": [1, {"a": null}]}'
ONE = [call(0, "get_weather", ARGUMENTS)]
TWO = [call(0, "get_weather", ARGUMENTS), call(1, "now", "{}")]


def listed(argument_key: str = "arguments") -> str:
    return f'[{{"name": "get_weather", "{argument_key}": {ARGUMENTS}}}, {{"name": "now", "{argument_key}": {{}}}}]'


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def mistral(*calls: ToolCallDelta) -> list[ToolCallDelta]:
    return [call(c.index, c.name, c.arguments, short_id(c.id)) for c in calls]


WRITTEN: dict[str, tuple[str, str, list[ToolCallDelta]]] = {
    "hermes": ("hermes", hermes("get_weather", ARGUMENTS), ONE),
    "hermes, two": ("hermes", f"{hermes('get_weather', ARGUMENTS)}\n{hermes('now', '{}')}", TWO),
    "hermes, two in one": (
        "hermes",
        f'<tool_call>{{"name":"get_weather","arguments":{ARGUMENTS}}}\n{{"name":"now","arguments":{{}}}}</tool_call>',
        TWO,
    ),
    "hermes, no closing": ("hermes", hermes("get_weather", ARGUMENTS).removesuffix("</tool_call>"), ONE),
    "arguments first": ("hermes", f'<tool_call>{{"arguments": {ARGUMENTS}, "name": "get_weather"}}</tool_call>', ONE),
    "arguments as text": (
        "hermes",
        f'<tool_call>{{"name": "get_weather", "arguments": {json.dumps(ARGUMENTS)}}}</tool_call>',
        ONE,
    ),
    "no arguments": ("hermes", '<tool_call>{"name": "now"}</tool_call>', [call(0, "now", "{}")]),
    "ids and types": (
        "hermes",
        '<tool_call>{"id": "a", "type": "function", "name": "now", "arguments": {}}</tool_call>',
        [call(0, "now", "{}")],
    ),
    "llama": ("llama3", f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}', ONE),
    "llama, marked": ("llama3", f'<|python_tag|>{{"name": "get_weather", "parameters": {ARGUMENTS}}}', ONE),
    "llama, two": (
        "llama3",
        f'\n{{"name": "get_weather", "parameters": {ARGUMENTS}}}; {{"name": "now", "parameters": {{}}}}',
        TWO,
    ),
    "mistral": ("mistral", f"[TOOL_CALLS] {listed()}", mistral(*TWO)),
    "mistral, named": (
        "mistral",
        f"[TOOL_CALLS]get_weather[CALL_ID]x7[ARGS]{ARGUMENTS}[TOOL_CALLS]now[ARGS]{{}}",
        mistral(*TWO),
    ),
    "mistral, named without a sign": ("mistral", f"[TOOL_CALLS]get_weather{ARGUMENTS}", mistral(*ONE)),
    "gemma, json": ("gemma", f'```json\n{{"name": "get_weather", "parameters": {ARGUMENTS}}}\n```', ONE),
    "gemma, bare": ("gemma", f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}', ONE),
    "gemma, json as code": ("gemma", f'```tool_code\n{{"name": "get_weather", "parameters": {ARGUMENTS}}}\n```', ONE),
    "gemma, code": (
        "gemma",
        '```tool_code\nget_weather(city=\'Par"is}\', days=[1, {"a": None}])\n```',
        [call(0, "get_weather", '{"city": "Par\\"is}", "days": [1, {"a": null}]}')],
    ),
    "gemma, printed code": (
        "gemma",
        "```tool_code\n[print(now()), wait(seconds=-1.5, soon=True)]\n```",
        [call(0, "now", "{}"), call(1, "wait", '{"seconds": -1.5, "soon": true}')],
    ),
    "granite": ("granite", f"<|tool_call|>{listed()}", TWO),
    "granite, one": ("granite", f'<tool_call>{{"name": "get_weather", "arguments": {ARGUMENTS}}}</tool_call>', ONE),
    "phi": ("phi4", f"functools{listed()}", TWO),
    "phi, marked": ("phi4", f"<|tool_call|>{listed()}<|/tool_call|>", TWO),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_calls_are_told_with_their_arguments(name: str) -> None:
    tool_format, text, calls = WRITTEN[name]
    parser = new_parser(tool_format)
    assert parsed([text], parser) == calls
    assert parser.has_tool_calls
    assert parsed(text, new_parser(tool_format)) == calls


@pytest.mark.parametrize("name", WRITTEN)
def test_text_around_calls_stays(name: str) -> None:
    tool_format, text, calls = WRITTEN[name]
    if FORMATS[tool_format].bare and not text.startswith(FORMATS[tool_format].openings):
        return  # without an opening, they are calls only at the beginning
    expected: list[Delta] = [TextDelta("One moment:"), *calls]
    if "<tool_call>" in text or "```" in text:
        assert parsed(f"One moment: {text}\n", new_parser(tool_format)) == expected
    else:
        assert parsed(f"One moment: {text}", new_parser(tool_format)) == expected


def test_the_name_is_told_before_the_arguments_are_there() -> None:
    parser = new_parser("hermes")
    assert parser.feed('<tool_call>\n{"name": "now", "argu') == []
    assert parser.feed('ments": {"zone') == [
        ToolCallDelta(0, "call_r_0_0", "now", ""),
        ToolCallDelta(0, "", "", '{"zone'),
    ]
    assert parser.feed('": 1') == [ToolCallDelta(0, "", "", '": 1')]
    assert parser.feed("}}") == [ToolCallDelta(0, "", "", "}")]
    assert parser.feed("\n</tool_call>") == parser.finish() == []


NO_CALLS: dict[str, tuple[str, str]] = {
    "text": ("hermes", "Hello, <tool> and <tool_cal"),
    "opening and nothing": ("hermes", "so <tool_call>"),
    "opening and prose": ("hermes", "the tag <tool_call> begins a call"),
    "not JSON": ("hermes", "<tool_call>\n{'name': 'now'}\n</tool_call>"),
    "name of nothing": ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    "no name": ("hermes", '<tool_call>{"arguments": {"a": 1}}</tool_call>'),
    "name as number": ("hermes", '<tool_call>{"name": 1, "arguments": {}}</tool_call>'),
    "long name": ("hermes", '<tool_call>{"name": "' + "x" * 1000 + '", "arguments": {}}</tool_call>'),
    "bad escape": ("hermes", '<tool_call>{"name": "\\x", "arguments": {}}</tool_call>'),
    "cut in the name": ("hermes", '<tool_call>{"name": "no'),
    "cut behind a backslash": ("hermes", '<tool_call>{"name": "no\\'),
    "arguments as list": ("hermes", '<tool_call>{"name": "now", "arguments": []}</tool_call>'),
    "unknown key": ("llama3", '{"name": "Paris", "population": 2}'),
    "a JSON answer": ("llama3", ' {"city": "Paris", "days": [1]}\n'),
    "a list": ("llama3", "[1, 2]"),
    "empty list": ("mistral", "[TOOL_CALLS][]"),
    "a word": ("phi4", "functools is a module of Python"),
    "code": ("gemma", "```tool_code\nimport os; os.remove('x')\n```"),
    "code with names": ("gemma", "```tool_code\nf(a=b)\n```"),
    "code with positions": ("gemma", "```tool_code\nf(1)\n```"),
    "code, nested calls": ("gemma", "```tool_code\nf(a=g(b=1))\n```"),
    "code without an end": ("gemma", "```tool_code\nf(a='"),
}


@pytest.mark.parametrize("name", NO_CALLS)
def test_what_only_looks_like_a_call_is_text(name: str) -> None:
    tool_format, text = NO_CALLS[name]
    parser = new_parser(tool_format)
    assert parsed([text], parser) == parsed(text, new_parser(tool_format)) == [TextDelta(text)]
    assert not parser.has_tool_calls


def test_arguments_that_break_off_stay_as_they_are() -> None:
    assert parsed(['<tool_call>{"name": "now", "arguments": {"a": '], new_parser("hermes")) == [
        call(0, "now", '{"a": ')
    ]
    assert parsed(['<tool_call>{"name": "now", "arguments": {"a": ]}'], new_parser("hermes")) == [
        call(0, "now", '{"a": '),
        TextDelta("]}"),
    ]


def test_one_call_at_most() -> None:
    text = f"{hermes('now', '{}')}\n{hermes('later', '{}')}"
    told = parsed([text], new_parser("hermes", parallel_tool_calls=False))
    assert told == [call(0, "now", "{}"), TextDelta(f"\n{hermes('later', '{}')}")]


def test_short_ids_are_those_that_mistral_s_templates_take() -> None:
    assert short_id("a1B2c3D4e") == "a1B2c3D4e"
    assert len(short_id("call_1")) == 9
    assert short_id("call_1").isalnum()
    assert short_id("call_1") != short_id("call_2")


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (None, "hermes"),
        ("{% for message in messages %}<|im_start|>", "hermes"),
        ("{{ tools }}<tool_call>", "hermes"),
        ("<|start_header_id|>{{ tools }}", "llama3"),
        ("[AVAILABLE_TOOLS]{{ tools }}[/AVAILABLE_TOOLS][TOOL_CALLS]", "mistral"),
        ("<start_of_turn>user", "gemma"),
        ("<|start_of_role|>assistant<|tool_call|>{{ tools }}", "granite"),
        ("<|system|>{{ message['tools'] }}<|tool|>", "phi4"),
    ],
)
def test_the_template_tells_the_format(template: str | None, name: str) -> None:
    assert detected_tool_format(template) == name
