"""Errors in Ollama's shape: one sentence."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from tokenrelay.service.errors import ServiceError


class OllamaErrorBody(BaseModel):
    error: str


def ollama_error(error: ServiceError, status: int) -> dict[str, Any]:
    """The status, which is not part of it, is that of the response."""
    return {"error": error.message}
