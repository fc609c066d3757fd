"""Calls that must be made: the grammar that leaves a model no other choice."""

from __future__ import annotations

from typing import Any

from tokenrelay.model.structured.errors import GrammarError
from tokenrelay.model.structured.tool_calls import Tool, tool_calls
from tokenrelay.service.api.assistant.dialect import Dialect
from tokenrelay.service.api.schemas.chat import ChatCompletionRequest
from tokenrelay.service.api.schemas.structured import Structure
from tokenrelay.service.errors import InvalidGrammar

_OPENING_WORDS = {"additionalProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf", "if"}


def structure_of(body: ChatCompletionRequest, dialect: Dialect) -> Structure | None:
    """What the text must be: calls, or what the body says otherwise. Raises InvalidGrammar."""
    if not body.must_call:
        return body.structure
    tools = [Tool(tool.function.name, _closed(tool.function.parameters)) for tool in body.forced_tools]
    try:
        grammar = tool_calls(tools, dialect.forced_calls, parallel=body.parallel_tool_calls is not False)
    except GrammarError as error:
        raise InvalidGrammar(f"'tools': {error}.", param="tools") from None
    return Structure("tools", "ready", grammar)


def _closed(schema: dict[str, Any] | None) -> dict[str, Any] | None:
    """A schema that lists properties means these: a small model would invent others without end."""
    if not schema or _OPENING_WORDS & schema.keys():
        return schema
    return {"type": "object", "properties": {}, **schema, "additionalProperties": False}
