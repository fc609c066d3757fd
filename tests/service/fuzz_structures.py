"""Schemas, regexes, choices and grammars under every name they are sent by: ones that a text can follow and ones that
none can, that are wrong, or too hard."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

Structure = Callable[[Random], dict[str, Any]]

GOOD_SCHEMAS: tuple[Any, ...] = (
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False},
    {"type": "object"},
    {"type": "boolean"},
    {"type": "null"},
    {},
    {"enum": ["red", "green", 3, None]},
    {"const": {"a": [1, 2]}},
    {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 3},
    {"type": "string", "maxLength": 3},
    {"type": "string", "pattern": "^[a-f]{2,4}$"},
    {"type": "string", "format": "date"},
    {"type": "integer", "minimum": -3, "maximum": 12},
    {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}}]},
    {"$ref": "#/$defs/node", "$defs": {"node": {"properties": {"next": {"$ref": "#/$defs/node"}}, "type": "object"}}},
    {"oneOf": [{"const": 1}, {"const": "日本"}]},
    {"allOf": [{"type": "object"}, {"required": ["a"], "properties": {"a": {"type": "null"}}}]},
    {"type": ["string", "number"]},
)
BAD_SCHEMAS: tuple[Any, ...] = (
    {"type": "nothing"},
    {"type": "integer", "minimum": 3, "maximum": 1},
    {"enum": []},
    {"$ref": "#/$defs/missing"},
    {"$ref": "https://example.com/schema.json"},
    {"type": "string", "pattern": "("},
    {"type": "string", "pattern": "(?=a)b"},
    {"type": "array", "minItems": 5, "maxItems": 2},
    {"type": "array", "minItems": 10**9},
    {"type": "number", "multipleOf": 1e-9},
    {"type": "number", "multipleOf": 0},
    {"not": {}},
    {"type": "object", "required": ["a"], "properties": {"a": False}},
    {"properties": []},
    {"x-guidance": {"whitespace_pattern": "("}},
    {"x-guidance": 1},
    {"minimum": float("inf")},
    {"maxLength": -1, "type": "string"},
    {"const": "\ud800"},
    {"unknownKeyword": True, "type": "string"},
)
GOOD_REGEXES = ("[a-z]{1,5}", "(yes|no)", r"\d+", "a*", ".", "", "[^x]*", "日本?", r"\x41", "/", "(?i)true", r"\p{L}+")
BAD_REGEXES = (
    "(",
    "(?=a)",
    r"(a)\1",
    "[z-a]",
    "a{1000000}",
    "((a{1,100}){1,100}){1,100}",
    "*",
    "[",
    "\\",
    "(?P<n",
    "\0",
)
GOOD_CHOICES = (["yes", "no"], ["a"], ["ab", "abc"], ["日本", "\n", '"\\'], ["x" * 200], ["a", "a"], [" "])
BAD_CHOICES: tuple[Any, ...] = ([], [""], "yes", [1], ["a"] * 5000, [None])
GOOD_GRAMMARS = (
    'root ::= "a" | "b"',
    "root ::= [a-z]+",
    'root ::= item ("," item)*\nitem ::= [0-9]{1,3}',
    'root ::= "x"\n  | "y" # a comment',
    'start: "x" "y"?',
    "start: /[a-c]+/",
    'start: "(" start ")" | "a"',
)
BAD_GRAMMARS = (
    *("root ::=", "root ::= missing", "root ::= root", "", "hello", 'start: "', "start: /(/", "start: %json {", "\0"),
    *('root ::= "\\uD800"', "root ::= [z-a]", 'other: "a"', "root ::= " + "(" * 3000, 'root ::= "a" |' * 50),
    *('start: %json {"type": "nothing"}', "start: <[99999]>", "start: a\na: a", 'root ::= "a"{1,100000}'),
)


def _schema(random: Random) -> Any:
    return _mostly(random, GOOD_SCHEMAS, BAD_SCHEMAS)


def _schema_or_text(random: Random) -> Any:
    schema = _schema(random)
    return json.dumps(schema) if random.random() < 0.2 else schema


def _regex(random: Random) -> Any:
    return _mostly(random, GOOD_REGEXES, BAD_REGEXES)


def _choices(random: Random) -> Any:
    return _mostly(random, GOOD_CHOICES, BAD_CHOICES)


def _grammar(random: Random) -> Any:
    return _mostly(random, GOOD_GRAMMARS, BAD_GRAMMARS)


def _mostly(random: Random, good: tuple[Any, ...], bad: tuple[Any, ...]) -> Any:
    chosen = random.choice(good if random.random() < 0.7 else bad)
    return _scrambled(random, chosen) if isinstance(chosen, str) and random.random() < 0.2 else chosen


def _scrambled(random: Random, text: str) -> str:
    """Without a part, or with one of its parts twice."""
    start, end = sorted((random.randint(0, len(text)), random.randint(0, len(text))))
    return text[:start] + random.choice(("", text[start:end] * 2)) + text[end:]


def _response_format(random: Random) -> dict[str, Any]:
    with_schema = {"type": "json_schema", "json_schema": {"name": "answer", "schema": _schema(random), "strict": True}}
    return random.choice(({"type": "text"}, {"type": "json_object"}, with_schema, with_schema))


def _structured_outputs(random: Random) -> dict[str, Any]:
    makers = {"json": _schema_or_text, "regex": _regex, "choice": _choices, "grammar": _grammar}
    name = random.choice([*makers, "json_object"])
    return {name: makers[name](random) if name in makers else True}


STRUCTURES: tuple[Structure, ...] = (
    lambda random: {"response_format": _response_format(random)},
    lambda random: {"structured_outputs": _structured_outputs(random)},
    lambda random: {"guided_json": _schema_or_text(random)},
    lambda random: {"guided_regex": _regex(random)},
    lambda random: {"guided_choice": _choices(random)},
    lambda random: {"guided_grammar": _grammar(random)},
    lambda random: {"grammar": _grammar(random)},
    lambda random: {"json_schema": _schema(random)},
    lambda random: {"regex": _regex(random)},
    lambda random: {"ebnf": _grammar(random)},
)
