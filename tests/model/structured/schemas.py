"""JSON schemas of many kinds; all of them allow some text, and none only endless ones."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def closed(**properties: Any) -> Schema:
    """An object with all of these properties and no others."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


CLOSED = {"type": "object", "additionalProperties": False}
WORD = {"type": "string", "maxLength": 8}
TREE = {
    "type": "object",
    "properties": {"children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}},
}

SCHEMAS: dict[str, Schema] = {
    "fixed keys": closed(name=WORD, age={"type": "integer", "minimum": 0, "maximum": 150}),
    "optional keys": CLOSED | {"properties": {"a": WORD, "b": {"type": "null"}}},
    "nested": closed(outer=closed(inner=closed(value={"type": "boolean"}))),
    "additional properties": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 3},
    "pattern properties": CLOSED | {"patternProperties": {"^x_[a-z]{1,3}$": WORD}},
    "min properties": {"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 2},
    "string": {"type": "string", "minLength": 2, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    "unanchored pattern": {"type": "string", "pattern": "[0-9]{2}", "maxLength": 20},
    "date": {"type": "string", "format": "date"},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "email": {"type": "string", "format": "email", "maxLength": 30},
    "integer": {"type": "integer", "minimum": -12, "maximum": 345},
    "exclusive bounds": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3},
    "number": {"type": "number", "minimum": -1.5, "maximum": 2.25},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 1000},
    "enum": {"enum": ["red", "green", 3, None, True, {"a": [1]}]},
    "const": {"const": {"x": [1, 2.5, "é\"\\\n"]}},
    "array": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 4},
    "bounded array": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    "tuple": {"type": "array", "prefixItems": [WORD, {"type": "integer"}], "items": False, "minItems": 2},
    "any of": {"anyOf": [WORD, {"type": "integer"}, closed(k={"const": 1})]},
    "one of by kind": {"oneOf": [closed(kind={"const": "a"}, a=WORD), closed(kind={"const": "b"}, b={"type": "null"})]},
    "all of": {"allOf": [{"type": "object", "properties": {"a": WORD}, "required": ["a"]}, {"maxProperties": 1}]},
    "several types": {"type": ["integer", "boolean", "null"]},
    "reference": {"$ref": "#/$defs/word", "$defs": {"word": WORD}},
    "recursion": {"$ref": "#/$defs/tree", "$defs": {"tree": TREE | {"additionalProperties": False}}},
    "mutual recursion": {
        "$ref": "#/$defs/a",
        "$defs": {
            "a": {"anyOf": [{"type": "null"}, closed(b={"$ref": "#/$defs/b"})]},
            "b": {"anyOf": [{"type": "null"}, closed(a={"$ref": "#/$defs/a"})]},
        },
    },
    "annotations": {"title": "T", "description": "d", "default": 1, "examples": [1], "type": "integer", "maximum": 9},
    "unicode keys": closed(**{"naïve ключ": {"const": "🙂"}, '"': {"const": 1}}),
}  # fmt: skip
