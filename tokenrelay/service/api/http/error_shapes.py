"""What an error's body looks like, which is up to the protocol that its path belongs to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenrelay.service.api.anthropic.errors import anthropic_error
from tokenrelay.service.api.ollama.errors import ollama_error
from tokenrelay.service.errors import ServiceError

_FOREIGN: tuple[tuple[str, Callable[[ServiceError, int], dict[str, Any]]], ...] = (
    ("/v1/messages", anthropic_error),
    ("/api/", ollama_error),
)


def error_body(error: ServiceError, status: int, path: str) -> dict[str, Any]:
    """OpenAI's shape, unless ``path`` is a foreign protocol's."""
    for prefix, shape in _FOREIGN:
        if path.startswith(prefix):
            return shape(error, status)
    return error.body()
