"""Whatever is written under a schema is JSON, and valid."""

from __future__ import annotations

import json

import pytest
from jsonschema import Draft202012Validator

from tests.model.structured.schemas import SCHEMAS, closed
from tests.model.structured.writing import Writer
from tokenrelay.model.structured import grammars
from tokenrelay.model.structured.compiler import GrammarCompiler
from tokenrelay.model.structured.errors import GrammarError


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_is_written_is_valid(compiler: GrammarCompiler, writer: Writer, name: str) -> None:
    schema = SCHEMAS[name]
    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    compiled = compiler.compile(grammars.json_schema(schema))
    for seed in range(12):
        text = writer.write(compiled.constraint(), seed)
        validator.validate(json.loads(text))


def test_a_json_object_is_an_object(compiler: GrammarCompiler, writer: Writer) -> None:
    for seed in range(12):
        text = writer.write(compiler.compile(grammars.json_object()).constraint(), seed)
        assert isinstance(json.loads(text), dict)


def test_a_schema_may_be_text(compiler: GrammarCompiler, writer: Writer) -> None:
    grammar = grammars.json_schema('{"const": 7}')
    assert writer.write(compiler.compile(grammar).constraint(), 0) == "7"
    for text, message in (("{", "line 1, column 2"), ("[1]", "JSON object"), ("[" * 100_000, "deeply")):
        with pytest.raises(GrammarError, match=message):
            grammars.json_schema(text)


def test_keys_come_in_the_schema_s_order(compiler: GrammarCompiler, writer: Writer) -> None:
    compiled = compiler.compile(grammars.json_schema(closed(z={"const": 1}, a={"const": 2}, m={"const": 3})))
    for seed in range(5):
        assert list(json.loads(writer.write(compiled.constraint(), seed))) == ["z", "a", "m"]


def test_blanks_have_a_bound_unless_the_schema_says_otherwise(compiler: GrammarCompiler, writer: Writer) -> None:
    schema = closed(a={"const": 1})
    few, many = "\n" + " " * 31, " " * 33
    bounded = compiler.compile(grammars.json_schema(schema))
    assert writer.can_write(bounded.constraint(), f'{{{few}"a"{few}:{few}1{few}}}')
    assert not writer.can_write(bounded.constraint(), f'{{{many}"a":1}}')
    free = compiler.compile(grammars.json_schema(schema | {"x-guidance": {"whitespace_pattern": r"\s+"}}))
    assert writer.can_write(free.constraint(), f'{{{many}"a":1}}')


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "uniqueItems": True},
        {"if": {"type": "string"}, "then": {"minLength": 1}},
        {"not": {"type": "string"}},
        {"type": "string", "format": "regex"},
        {"oneOf": [{"type": "string"}, {"type": "string", "minLength": 2}]},
        {"type": "object", "dependentRequired": {"a": ["b"]}},
        {"type": "object", "propertyNames": {"pattern": "a"}},
    ],
    ids=json.dumps,
)
def test_what_cannot_be_kept_is_refused_and_not_ignored(compiler: GrammarCompiler, schema: dict[str, object]) -> None:
    with pytest.raises(GrammarError, match=r"Unimplemented keys|Unknown format|not supported"):
        compiler.compile(grammars.json_schema(schema))
