"""Errors in the shape that Anthropic's clients read. Statuses stay those of the tree: clients retry by them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from tokenrelay.service.errors import ServiceError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class AnthropicError(BaseModel):
    type: str
    message: str


class AnthropicErrorBody(BaseModel):
    """The same in a stream, as its last event."""

    type: Literal["error"] = "error"
    error: AnthropicError


def anthropic_error(error: ServiceError, status: int) -> dict[str, Any]:
    """``status`` is that of the response, if it differs from the error's."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}
