"""Values that a JSON schema allows, the edges among them, and values that it does not.

Understands what pydantic writes of the request schemas, so that a new parameter is fuzzed from its first day.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

JSONSchema = Mapping[str, Any]
Maker = Callable[[Random], Any]

FEW = 4  # items of an array, usually
MANY = 300  # items at most
TEXTS = ("a", " the", "\n", "}", "Hello, world", "é", "日本", "👩‍👩‍👧", "\0", "<|im_end|>", "{{ x }}", "%s", " " * 40)
WEIRD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 0.5, -0.0, 10**40, -(10**40), 2**31, 2**63, 2**64, 1e308, 5e-324),
    *(math.nan, math.inf, -math.inf, "", "0", "true", "\0", "\ud800", "日本", "x" * 5000),
    *([], [[]], [None], [0] * 2000, [{}], ["a", 1], {}, {"a": {}}, {"": 0}),
    *({"type": "text"}, {"type": "json_schema"}),
)


class Values:
    """Draws from ``random``. ``definitions`` are the schema's ``$defs``."""

    def __init__(self, random: Random, definitions: Mapping[str, JSONSchema]) -> None:
        self._random = random
        self._definitions = definitions

    def fitting(self, schema: JSONSchema) -> Any:
        """A value that the schema allows; rules between fields are not in it."""
        schema = self._resolved(schema)
        if "enum" in schema or "const" in schema:
            return self._random.choice(schema.get("enum") or [schema["const"]])
        makers = {
            "null": lambda _: None,
            "boolean": lambda _: self._random.random() < 0.5,
            "integer": self._integer,
            "number": self._number,
            "string": self._string,
            "array": self._array,
            "object": self._object,
        }
        return makers[schema.get("type", "object")](schema)

    def unfitting(self, schema: JSONSchema) -> Any:
        """A value just outside of what the schema allows, or something altogether different."""
        schema = self._resolved(schema)
        outside = [*self._beyond_the_ends(schema), *self._of_the_wrong_length(schema)]
        if outside and self._random.random() < 0.6:
            return self._random.choice(outside)
        return self._random.choice(WEIRD)

    def _resolved(self, schema: JSONSchema) -> JSONSchema:
        """Without references, and one branch of a union: null rarely."""
        while "anyOf" in schema or "$ref" in schema:
            if "$ref" in schema:
                schema = self._definitions[schema["$ref"].rpartition("/")[2]]
            else:
                branches = [branch for branch in schema["anyOf"] if branch.get("type") != "null"]
                schema = {"type": "null"} if self._random.random() < 0.05 else self._random.choice(branches)
        return schema

    def _integer(self, schema: JSONSchema) -> int:
        low = schema.get("minimum", -3)
        high = schema.get("maximum", max(low, 0) + 2**31)
        near = min(high, low + 5)
        return self._random.choice((low, high, min(high, low + 1), self._random.randint(low, near), near, near))

    def _number(self, schema: JSONSchema) -> float:
        low, high = _ends(schema)
        lowest = math.nextafter(low, high) if "exclusiveMinimum" in schema else low
        between = self._random.uniform(lowest, min(high, lowest + 2))
        return self._random.choice((lowest, high, min(high, lowest + 1), between, between, round(between, 2) or lowest))

    def _string(self, schema: JSONSchema) -> str:
        longest, shortest = schema.get("maxLength", 1000), schema.get("minLength", 0)
        text = self._random.choice(TEXTS) if self._random.random() < 0.95 else "ab " * longest
        return text[:longest].ljust(shortest, "x")

    def _array(self, schema: JSONSchema) -> list[Any]:
        shortest, longest = schema.get("minItems", 0), min(schema.get("maxItems", MANY), MANY)
        usual = self._random.randint(shortest, max(shortest, min(FEW, longest)))
        count = longest if self._random.random() < 0.02 else usual
        return [self.fitting(schema.get("items", {"type": "string"})) for _ in range(count)]

    def _object(self, schema: JSONSchema) -> dict[str, Any]:
        properties, required = schema.get("properties", {}), schema.get("required", ())
        if not properties:
            return {"a": self._random.choice(TEXTS)} if self._random.random() < 0.8 else {}
        names = [name for name in properties if name in required or self._random.random() < 0.3]
        return {name: self.fitting(properties[name]) for name in names}

    def _beyond_the_ends(self, schema: JSONSchema) -> list[Any]:
        if schema.get("type") not in ("integer", "number"):
            return []
        low, high = _ends(schema)
        if schema["type"] == "integer":
            return [int(low) - 1, int(high) + 1, low + 0.5, float(low), str(low)]
        return [low if "exclusiveMinimum" in schema else math.nextafter(low, -math.inf), high + 1e-9, str(low), True]

    def _of_the_wrong_length(self, schema: JSONSchema) -> list[Any]:
        if schema.get("type") == "string":
            return ["" if schema.get("minLength") else 1, "x" * (schema.get("maxLength", 50_000) + 1)]
        if schema.get("type") == "array":
            items, longest = schema.get("items", {}), schema.get("maxItems", MANY)
            too_many = [self.fitting(items)] * (longest + 1) if longest <= 5000 else []
            return [[], too_many, [*self._array(schema), self.unfitting(items)], self.fitting(items)]
        return []


def _ends(schema: JSONSchema) -> tuple[float, float]:
    low = schema.get("minimum", schema.get("exclusiveMinimum", -(2**31)))
    return low, schema.get("maximum", 2**31)
