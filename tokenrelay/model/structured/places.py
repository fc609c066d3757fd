"""Where in a JSON schema an error is. llguidance says what is wrong with a schema, and not where."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

_CARRIED = ("$schema", "$defs", "definitions", "x-guidance")  # the whole's, that a part needs to be compiled alone
_BY_NAME = ("$defs", "definitions", "properties", "patternProperties")
_IN_ORDER = ("anyOf", "allOf", "oneOf", "prefixItems", "items")
_SINGLE = ("items", "additionalProperties", "not")


def place_of_error(schema: Mapping[str, Any], error_of: Callable[[Mapping[str, Any]], str]) -> str:
    """JSON pointer of the innermost part that alone has the error of the whole. ``error_of`` compiles a schema, and
    gives "" when it has had enough."""
    error, carried = error_of(schema), {name: schema[name] for name in _CARRIED if name in schema}
    place: str = "#"
    found: tuple[str, Mapping[str, Any]] | None = (place, schema)
    while found is not None:
        place, part = found
        same = (child for child in _parts(place, part) if error_of({**carried, **child[1]}) == error)
        found = next(same, None)
    return place


def _parts(place: str, schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for keyword, value in schema.items():
        children: list[tuple[str, Any]] = []
        if keyword in _BY_NAME and isinstance(value, Mapping):
            children = [(f"{keyword}/{_escaped(name)}", child) for name, child in value.items()]
        elif keyword in _IN_ORDER and isinstance(value, list):
            children = [(f"{keyword}/{index}", child) for index, child in enumerate(value)]
        elif keyword in _SINGLE:
            children = [(keyword, value)]
        yield from ((f"{place}/{name}", child) for name, child in children if isinstance(child, Mapping))


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
