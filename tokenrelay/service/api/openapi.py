"""The documentation of routes that read their bodies themselves, where FastAPI cannot see the schema."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from tokenrelay import __version__
from tokenrelay.service.api.anthropic.request import CountTokensRequest, MessagesRequest
from tokenrelay.service.api.client_terms import IDEMPOTENCY_KEY, TIMEOUT
from tokenrelay.service.api.ollama.request import OllamaChatRequest, OllamaGenerateRequest, ShowRequest
from tokenrelay.service.api.responses.request import ResponsesRequest
from tokenrelay.service.api.schemas.chat import ChatCompletionRequest
from tokenrelay.service.api.schemas.completions import CompletionRequest
from tokenrelay.service.api.schemas.embeddings import EmbeddingRequest
from tokenrelay.service.api.schemas.errors import ErrorBody
from tokenrelay.service.api.schemas.tokenization import ApplyTemplateRequest, DetokenizeRequest, TokenizeRequest


def _header(name: str, description: str, type: str = "string") -> dict[str, Any]:
    return {"name": name, "in": "header", "description": description, "schema": {"type": type}}


_REF = "#/components/schemas/{model}"
_BODIES: tuple[type[BaseModel], ...] = (
    *(ChatCompletionRequest, CompletionRequest, ResponsesRequest, MessagesRequest, CountTokensRequest),
    *(OllamaChatRequest, OllamaGenerateRequest, ShowRequest),
    EmbeddingRequest,
    *(TokenizeRequest, DetokenizeRequest, ApplyTemplateRequest),
)

_HEADERS = [
    _header(IDEMPOTENCY_KEY, "A request with the key of an earlier one, and its body, is answered with its answer."),
    _header(TIMEOUT, "Seconds until the request must be done, its time in the queue included.", type="number"),
]


def errors(body: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """In this shape."""
    return {
        "4XX": {"model": body, "description": "The request is at fault; the message says how."},
        "5XX": {"model": body, "description": "The server is at fault; Retry-After says when to try again."},
    }


ERRORS = errors(ErrorBody)


def documented(
    body: type[BaseModel], answer: type[BaseModel], error: type[BaseModel] = ErrorBody, *, queued: bool = True
) -> dict[str, Any]:
    """The arguments of a route decorator that describe its body and its answers, and the headers of queued work."""
    content = {"application/json": {"schema": {"$ref": _REF.format(model=body.__name__)}}}
    return {
        "response_model": None,
        "responses": {200: {"model": answer, "description": "The answer, unless it is streamed."}, **errors(error)},
        "openapi_extra": {
            "requestBody": {"required": True, "content": content},
            "parameters": _HEADERS if queued else [],
        },
    }


def add_openapi(app: FastAPI) -> None:
    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _schema(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _schema(app: FastAPI) -> dict[str, Any]:
    schema = get_openapi(title=app.title, version=__version__, routes=app.routes)
    _, bodies = models_json_schema([(body, "validation") for body in _BODIES], ref_template=_REF)
    schema["components"]["schemas"].update(bodies["$defs"])
    return schema
