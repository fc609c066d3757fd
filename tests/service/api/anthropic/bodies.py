"""Small bodies of Messages requests, and what they become."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tokenrelay.service.api.anthropic import translation
from tokenrelay.service.api.anthropic.request import MessagesRequest
from tokenrelay.service.api.assistant.dialect import Dialect
from tokenrelay.service.api.http.body import validate

PLAIN = Dialect("", "", False, False, frozenset(), {})
SWITCHABLE = replace(PLAIN, reasoning_format="think", variables=frozenset({"enable_thinking"}))
THINKER = replace(PLAIN, reasoning_format="think")


def body(**fields: Any) -> dict[str, Any]:
    """None leaves a field out."""
    given = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}], **fields}
    return {name: value for name, value in given.items() if value is not None}


def chat_fields(dialect: Dialect = PLAIN, **fields: Any) -> dict[str, Any]:
    """The chat completion's fields that are set."""
    return translation.chat_fields(validate(MessagesRequest, body(**fields)), dialect)
