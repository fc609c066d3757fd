"""Forced tool calls: the family's text around them, a tool that is there, arguments that its schema allows."""

from __future__ import annotations

import json

import pytest
from jsonschema import validate

from tests.model.structured.schemas import closed
from tests.model.structured.writing import Writer
from tokenrelay.model.structured.compiler import GrammarCompiler
from tokenrelay.model.structured.tool_calls import HERMES, NO_PARAMETERS, Tool, ToolCallFormat, tool_calls

TOOLS = {
    "get_weather": closed(city={"enum": ["Paris", "Rome"]}, days={"type": "integer", "minimum": 1, "maximum": 9}),
    "get_time": None,
    "get": closed(key={"type": "string", "maxLength": 4}),
}
ALL = [Tool(name, parameters) for name, parameters in TOOLS.items()]


def hermes_calls(text: str) -> list[str]:
    """The names of calls that are well-formed and valid, and nothing else is there."""
    names = []
    for call in text.split("</tool_call>\n" if text.count("</tool_call>") > 1 else "\0"):
        body = json.loads(call.removeprefix("<tool_call>\n").removesuffix("</tool_call>").removesuffix("\n"))
        validate(body["arguments"], TOOLS[body["name"]] or NO_PARAMETERS)
        names.append(body["name"])
    return names


def test_one_call_of_any_tool(compiler: GrammarCompiler, writer: Writer) -> None:
    compiled = compiler.compile(tool_calls(ALL, HERMES, parallel=False))
    calls = [hermes_calls(writer.write(compiled.constraint(), seed)) for seed in range(60)]
    assert {len(names) for names in calls} == {1}
    assert {names[0] for names in calls} == TOOLS.keys()


def test_a_named_tool_is_the_only_one_given(compiler: GrammarCompiler, writer: Writer) -> None:
    compiled = compiler.compile(tool_calls(ALL[1:2], HERMES, parallel=False))
    assert {tuple(hermes_calls(writer.write(compiled.constraint(), seed))) for seed in range(5)} == {("get_time",)}


def test_several_calls(compiler: GrammarCompiler, writer: Writer) -> None:
    compiled = compiler.compile(tool_calls(ALL, HERMES, parallel=True))
    counts = {len(hermes_calls(writer.write(compiled.constraint(), seed))) for seed in range(20)}
    assert {1, 2} <= counts


def test_other_families(compiler: GrammarCompiler, writer: Writer) -> None:
    plain = ToolCallFormat(before_name="<function=", before_arguments=">", after_arguments="</function>")
    text = writer.write(compiler.compile(tool_calls(ALL[1:2], plain, parallel=False)).constraint(), 0)
    assert text.startswith("<function=get_time>{")
    assert text.endswith("}</function>")


@pytest.mark.parametrize("parallel", [False, True])
def test_text_that_spells_a_special_token_is_that_token(
    compiler: GrammarCompiler, writer: Writer, parallel: bool
) -> None:
    (marker,) = writer.tokenizer.encode("<file_sep>", add_special_tokens=False)
    listed = ToolCallFormat(
        opening="<file_sep>[",
        before_name='{"name": "',
        before_arguments='", "arguments": ',
        after_arguments="}",
        separator=", ",
        closing="]",
        special_ids={"<file_sep>": marker},
    )
    compiled = compiler.compile(tool_calls(ALL, listed, parallel=parallel))
    assert compiled.constraint().forced()[0] == marker
    for seed in range(8):
        calls = json.loads(writer.write(compiled.constraint(), seed))  # special tokens are not part of the text
        assert len(calls) == 1 or parallel
        for call in calls:
            validate(call["arguments"], TOOLS[call["name"]] or NO_PARAMETERS)
