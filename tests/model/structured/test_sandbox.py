"""Grammars that would take any time, memory or stack end in an error, and hurt nobody else."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from tests.model.structured.schemas import SCHEMAS, closed
from tests.model.structured.test_grammars import REGEXES, SUM_GBNF, SUM_LARK
from tests.model.structured.writing import Writer, allowed
from tokenrelay.model.structured import grammars
from tokenrelay.model.structured.compiler import GrammarCompiler
from tokenrelay.model.structured.errors import GrammarError
from tokenrelay.model.structured.sandbox import TOO_HARD, Sandbox
from tokenrelay.model.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def sandbox(tokenizer: Tokenizer) -> Iterator[Sandbox]:
    sandbox = Sandbox(tokenizer)
    yield sandbox
    sandbox.close()


def error_of(sandbox: Sandbox, kind: str, source: Any) -> str:
    with pytest.raises(GrammarError) as caught:
        sandbox.try_out(kind, source)
    return str(caught.value)


def test_the_grammar_comes_back_as_its_maker_writes_it(sandbox: Sandbox) -> None:
    for kind, source in (
        ("json_schema", SCHEMAS["enum"]),
        ("regex", "a|ü"),
        ("choice", ["a", "🙂\n"]),
        ("ebnf", SUM_GBNF),
        ("ebnf", SUM_LARK),
    ):
        assert sandbox.try_out(kind, source) == grammars.MAKERS[kind](source)


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        (closed(a={"type": "array", "items": closed(b={"uniqueItems": True})}), "#/properties/a/items/properties/b"),
        (closed(a={"$ref": "#/$defs/b"}) | {"$defs": {"b": {"not": {}}}}, "#/properties/a"),
        ({"$defs": {"b": {"not": {}}}} | closed(a={"$ref": "#/$defs/b"}), "#/$defs/b"),
        ({"anyOf": [{"type": "string"}, {"type": "text"}]}, "#/anyOf/1"),
        ({"properties": {"a/b": {"properties": {"c~": {"pattern": "("}}}}}, "#/properties/a~1b/properties/c~0"),
        ({"additionalProperties": {"format": "regex", "type": "string"}}, "#/additionalProperties"),
    ],
    ids=json.dumps,
)
def test_an_error_in_a_schema_names_the_part(sandbox: Sandbox, schema: dict[str, Any], place: str) -> None:
    assert error_of(sandbox, "json_schema", schema).startswith(f"at {place}: ")


def chain(length: int) -> dict[str, Any]:
    definitions: dict[str, Any] = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(length)}
    return {"$ref": "#/$defs/a0", "$defs": {**definitions, f"a{length}": {"type": "string"}}}


TOO_MUCH: dict[str, tuple[str, Any]] = {
    "a long chain of references": ("json_schema", chain(2000)),
    "a chain of rules": ("ebnf", "".join(f"r{i}: r{i + 1}\n" for i in range(5000)) + 'r5000: "a"\nstart: r0'),
    "many patterns": ("json_schema", {"patternProperties": {f"^p{i}[a-z]*$": {} for i in range(999)}}),
    "a large divisor": ("json_schema", {"type": "integer", "multipleOf": 999_983}),
    "thousands of properties": ("json_schema", {"properties": {f"p{i}": {} for i in range(8000)}}),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_llguidance_does_not_bound_is_bounded(sandbox: Sandbox, name: str) -> None:
    assert error_of(sandbox, *TOO_MUCH[name]) == TOO_HARD
    assert sandbox.try_out("regex", f"after {name}")


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("json_schema", nested(200), "recursion limit"),
        ("json_schema", nested(5000), "nested too deeply"),
        ("json_schema", {"enum": ["x" * 140_000]}, "131072 are allowed"),
        ("json_schema", {"$ref": "#"}, "nothing that it allows"),
        ("regex", "(" * 300 + ")" * 300, "maximum number of nested parentheses"),
        ("regex", "(x?){2000}x{2000}", "too complex"),
        ("ebnf", "start: " + "(" * 5000, "too deeply"),
        ("ebnf", "root ::= " + "(" * 5000, "too deeply"),
        (
            "ebnf",
            "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(60)) + 'A60: "a"',
            "too big|more than 1 s",
        ),
    ],
)
def test_what_llguidance_bounds_says_so(sandbox: Sandbox, kind: str, source: Any, message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        sandbox.try_out(kind, source)


def test_a_regex_bomb_is_harmless(sandbox: Sandbox, compiler: GrammarCompiler, writer: Writer) -> None:
    """Its automaton is only made as far as a text gets."""
    for bomb in ("(a{1,1000}){1,1000}", ".{1000000000}", "((a*)*)*b", "(.*a.{40})"):
        grammar = sandbox.try_out("regex", bomb)
        assert compiler.compile(grammar).constraint().masks(()).any()


def test_many_ask_at_once(sandbox: Sandbox) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: sandbox.try_out("regex", f"number {i % 8}"), range(24)))
    assert made == [grammars.regex(f"number {i % 8}") for i in range(24)]


def test_the_same_is_not_tried_again(sandbox: Sandbox) -> None:
    sandbox.try_out("regex", "twice")
    before = psutil.Process(_pid(sandbox)).num_ctx_switches()
    sandbox.try_out("regex", "twice")
    assert psutil.Process(_pid(sandbox)).num_ctx_switches() == before


def test_its_process_may_be_killed(sandbox: Sandbox) -> None:
    pid = _pid(sandbox)
    os.kill(pid, signal.SIGKILL)
    psutil.Process(pid).wait(10)
    assert sandbox.try_out("regex", "another process")
    assert _pid(sandbox) != pid


def test_its_process_ends_with_the_last_user(tokenizer: Tokenizer) -> None:
    sandbox = Sandbox(tokenizer)
    sandbox.try_out("regex", "a")
    process = psutil.Process(_pid(sandbox))
    assert sandbox._control is not None
    sandbox._control.close()  # as when this process dies
    process.wait(10)
    sandbox.close()


def _pid(sandbox: Sandbox) -> int:
    assert sandbox._process is not None
    return sandbox._process.pid


# --- anything may be sent ---------------------------------------------------------------------------------------------

SOURCES: list[tuple[str, str]] = [
    *(("json_schema", json.dumps(schema)) for schema in SCHEMAS.values()),
    *(("regex", pattern) for pattern in REGEXES),
    ("ebnf", SUM_GBNF),
    ("ebnf", SUM_LARK),
]
SCRAPS = [
    *'"{}[]()|*+?^$\\.:,~&/<>@%=-_#\n 0é🙂\x00',
    *("999999999", "-1", "1e9", "null", "{1,9999}", '"$ref": "#"', '"type"', '"not"', '"pattern"', '"multipleOf": 7'),
    *("start", "root", "::=", "%json {", "%ignore / /", "%import common.WORD", "[lazy]", "<[*]>", "(?i)", r"\p{L}"),
]  # fmt: skip


def mutated(chance: random.Random) -> tuple[str, str]:
    """A source with up to four small changes."""
    kind, text = chance.choice(SOURCES)
    for _ in range(chance.randint(1, 4)):
        start = chance.randrange(len(text) + 1)
        end = min(len(text), start + chance.choice([0, 0, 1, 1, 3, 20]))
        other = chance.choice(SOURCES)[1]
        piece = chance.choice([chance.choice(SCRAPS), "", text[start:end] * 2, other[start : start + 20]])
        text = text[:start] + piece + text[end:]
    return kind, text


def try_mutations(sandbox: Sandbox, compiler: GrammarCompiler, writer: Writer, seeds: range) -> list[str]:
    """What became of each: "" if it can be used."""

    def try_one(seed: int) -> str:
        kind, source = mutated(random.Random(seed))
        try:
            grammar = sandbox.try_out(kind, source)
        except GrammarError as error:
            return str(error)
        constraint = compiler.compile(grammar).constraint()
        for _ in range(10):
            (mask,) = constraint.masks(())
            assert mask.any()
            constraint.accept([int(random.Random(seed).choice(allowed(mask)))])
        return ""

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(try_one, seeds))


def test_mutations_compile_or_say_why_not(sandbox: Sandbox, compiler: GrammarCompiler, writer: Writer) -> None:
    results = try_mutations(sandbox, compiler, writer, range(100))
    assert 10 < results.count("") < 90
    assert max(map(len, results)) < 600


@pytest.mark.long
def test_many_mutations(sandbox: Sandbox, compiler: GrammarCompiler, writer: Writer) -> None:
    results = try_mutations(sandbox, compiler, writer, range(100, 5000))
    assert 490 < results.count("") < 4410
    assert threading.active_count() < 20
