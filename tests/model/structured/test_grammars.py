"""Regexes, choices, GBNF and Lark: what is written belongs to the language, and errors say where."""

from __future__ import annotations

import ast
import re

import pytest

from tests.model.structured.writing import Writer
from tokenrelay.model.structured import grammars
from tokenrelay.model.structured.compiler import GrammarCompiler
from tokenrelay.model.structured.errors import MAX_MESSAGE, GrammarError

REGEXES = [
    "abc",
    "^abc$",
    "a/b\n",
    "(yes|no)( please)?",
    r"\d{3}-[a-f]{2,4}",
    r"[A-Z][a-z]{1,9}( [A-Z][a-z]{1,9}){0,2}",
    r"(?i)hello",
    r"[^a-z\s]{1,5}",
    "é{2}🙂",
    r"(?P<year>20[0-9]{2})",
    "",
]


@pytest.mark.parametrize("pattern", REGEXES)
def test_the_regex_matches_what_is_written(compiler: GrammarCompiler, writer: Writer, pattern: str) -> None:
    compiled = compiler.compile(grammars.regex(pattern))
    for seed in range(8):
        text = writer.write(compiled.constraint(), seed)
        assert re.fullmatch(pattern, text), text


def test_one_of_the_choices_is_written(compiler: GrammarCompiler, writer: Writer) -> None:
    choices = ["yes", "yes, but", "né\n\t", '"quoted\\"', "🙂", "</s>", "x" * 300]
    compiled = compiler.compile(grammars.choice(choices))
    assert {writer.write(compiled.constraint(), seed) for seed in range(60)} == set(choices)


def test_thousands_of_choices(compiler: GrammarCompiler, writer: Writer) -> None:
    choices = [f"item {i}" for i in range(4096)]
    assert writer.write(compiler.compile(grammars.choice(choices)).constraint(), 0) in choices


SUM_GBNF = r"""
# sums of small numbers
root   ::= term (ws [+*] ws term){0,3}
  | "none"
term   ::= num | "(" ws num ws "-" ws num ws ")"
num    ::= [1-9] [0-9]{0,2}
ws     ::= " "?
"""
SUM_LARK = r"""
start: term (WS OPERATOR WS term){0,3} | "none"
term: NUM | "(" WS NUM WS "-" WS NUM WS ")"
OPERATOR: /[+*]/
NUM: /[1-9][0-9]{0,2}/
WS: / ?/
"""


@pytest.mark.parametrize("grammar", [SUM_GBNF, SUM_LARK], ids=["GBNF", "Lark"])
def test_a_context_free_grammar(compiler: GrammarCompiler, writer: Writer, grammar: str) -> None:
    compiled = compiler.compile(grammars.ebnf(grammar))
    for seed in range(15):
        text = writer.write(compiled.constraint(), seed)
        assert text == "none" or isinstance(ast.parse(text, mode="eval"), ast.Expression)
    assert writer.can_write(compiled.constraint(), "12 * (3 - 4)+5")
    assert not writer.can_write(compiled.constraint(), "12 * (3 - (4))")


def test_brackets_that_nest(compiler: GrammarCompiler, writer: Writer) -> None:
    compiled = compiler.compile(grammars.ebnf('root ::= "(" root ")" | "x"'))
    assert writer.can_write(compiled.constraint(), "((((x))))")
    assert not writer.can_write(compiled.constraint(), "((((x)))")


def test_escapes_of_gbnf(compiler: GrammarCompiler, writer: Writer) -> None:
    escaped = r'root ::= "\x41\u00e9\U0001F642\"\\\n\[" [\x61-\x63\u03b1-\u03b3\]\-\t]'
    compiled = compiler.compile(grammars.ebnf(escaped))
    last = {writer.write(compiled.constraint(), seed).removeprefix('Aé🙂"\\\n[') for seed in range(80)}
    assert last == set("abcαβγ]-\t")


def test_a_rule_of_gbnf_may_be_called_start(compiler: GrammarCompiler, writer: Writer) -> None:
    grammar = 'start ::= "s"\nroot ::= start "." start'
    with pytest.raises(GrammarError, match="already exists"):  # the converter's own name for the root
        grammars.ebnf(grammar)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (grammars.regex("x(ab"), r"unclosed group at character 2 of the regex x\(ab"),
        (grammars.regex("a(?=b)"), "look-ahead and look-behind, is not supported at character 2"),
        (grammars.regex(r"(a)\1"), "backreferences are not supported at character 4"),
        (grammars.lark("start: b\nb: undefined"), 'line 2, column 4: unknown name: "undefined"'),
        (grammars.lark('rule: "a"'), "no start rule"),
        (grammars.lark("start: <|no_such_token|>"), "unknown special token"),
        (grammars.lark("start: start"), "nothing that it allows can come here"),
        (grammars.lark("start: A\nA: /a/ & /b/"), "nothing that it allows can come here"),
        (grammars.json_schema({"type": "integer", "minimum": 2, "maximum": 1}), "minimum .2. is greater than maximum"),
        (grammars.json_schema({"pattern": "a)", "type": "string"}), "unopened group at character 2"),
        (grammars.json_schema({"$ref": "#/$defs/x"}), "/.defs/x' does not exist"),
        (grammars.json_schema({"x-guidance": {"lineant": True}}), "unknown field `lineant`"),
        ("", "Empty grammar"),
        ('{"grammars": []}', "empty"),
        ("x" * 300_000, "300000 characters, and 131072 are allowed"),
    ],
)
def test_an_error_says_what_and_where(compiler: GrammarCompiler, grammar: str, message: str) -> None:
    with pytest.raises(GrammarError, match=message) as caught:
        compiler.compile(grammar)
    assert len(str(caught.value)) <= MAX_MESSAGE
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ('root ::= "a" other', "'other' not found"),
        ('root ::= "a', "line 1"),
        ('root ::= ("a"', r"Expected '\)' at line 1"),
        ('top ::= "a"', "No 'root' rule"),
        (r'root ::= "\uD800"', "not a character"),
        ("root ::= " + "(" * 5000, "nested too deeply"),
    ],
)
def test_an_error_in_gbnf(grammar: str, message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        grammars.ebnf(grammar)
