"""How routes describe what FastAPI cannot see: bodies they read themselves, streams, errors and headers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from tokenrelay.service.api.admission.client_terms import IDEMPOTENCY_KEY, TIMEOUT
from tokenrelay.service.api.schemas.errors import ErrorBody
from tokenrelay.service.errors import ServiceError

REF = "#/components/schemas/{model}"

Responses = dict[int | str, dict[str, Any]]


def header(description: str, type: str = "string") -> dict[str, Any]:
    return {"description": description, "schema": {"type": type}}


def parameter(name: str, description: str, type: str = "string") -> dict[str, Any]:
    return {"name": name, "in": "header", **header(description, type)}


_PARAMETERS = [
    parameter(IDEMPOTENCY_KEY, "A request with the key of an earlier one, and its body, is answered with its answer."),
    parameter(TIMEOUT, "Seconds until the request must be done, its time in the queue included.", type="number"),
]
_ANSWERED = {
    "X-Response-Id": header("The id of the answer, told before its first chunk."),
    "Idempotent-Replayed": header("true: an earlier request with this key is answered."),
    "X-Attention-Sinks": header("First tokens that attention keeps, if texts may outgrow the context.", "integer"),
}
_REFUSED = {"x-should-retry": header("Whether the same request may succeed later: true or false.")}
_RETRYABLE = {
    "Retry-After": header("Seconds until a retry makes sense.", "integer"),
    "retry-after-ms": header("The same in milliseconds.", "integer"),
}


def schema_of(model: type[BaseModel], mode: JsonSchemaMode = "validation") -> dict[str, Any]:
    """A reference, and beside it what it refers to; that is moved to where it belongs once all is there."""
    _, schemas = models_json_schema([(model, mode)], ref_template=REF)
    return {"$ref": REF.format(model=model.__name__), "$defs": schemas["$defs"]}


_EVENT = {
    "id": {"type": "string", "description": "To resume behind."},
    "event": {"type": "string"},
    "retry": {"type": "integer", "description": "Milliseconds until a browser connects again."},
}


def events(*data: type[BaseModel]) -> dict[str, Any]:
    """The content of a response that is a stream. OpenAPI 3.1 has no word for it: the schema is that of each event."""
    schemas = {"anyOf": [schema_of(model, "serialization") for model in data]}
    text = {"type": "string", "contentMediaType": "application/json", "contentSchema": schemas}
    either = {"anyOf": [text, {"const": "[DONE]"}]}
    event = {"type": "object", "properties": {**_EVENT, "data": either}, "required": ["data"]}
    return {"text/event-stream": {"schema": event}}


def lines(*data: type[BaseModel]) -> dict[str, Any]:
    """The same of a stream that is lines of JSON: the schema is that of each line."""
    return {"application/x-ndjson": {"schema": {"anyOf": [schema_of(model, "serialization") for model in data]}}}


def _kinds(kind: type[ServiceError] = ServiceError) -> Iterator[type[ServiceError]]:
    yield kind
    for narrower in kind.__subclasses__():
        yield from _kinds(narrower)


def errors(shape: type[BaseModel]) -> Responses:
    """By status: every error there is, as a route's protocol writes them."""
    content = {"application/json": {"schema": schema_of(shape)}}
    return {status: {**_error(status), "content": content} for status in sorted({kind.status for kind in _kinds()})}


def _error(status: int) -> dict[str, Any]:
    kinds = [kind for kind in _kinds() if kind.status == status]
    codes = ", ".join(dict.fromkeys(kind.code for kind in kinds))
    retryable = _RETRYABLE if any(kind.retryable for kind in kinds) else {}
    return {"description": f"Its code says more: {codes}.", "headers": _REFUSED | retryable}


ERRORS = errors(ErrorBody)


def documented(
    body: type[BaseModel],
    answer: type[BaseModel],
    error: type[BaseModel] = ErrorBody,
    *,
    queued: bool = True,
    chunks: Sequence[type[BaseModel]] = (),
    stream: Callable[..., dict[str, Any]] = events,
) -> dict[str, Any]:
    """The arguments of a route decorator that describe its body, its answer, a stream's chunks and its errors, and the
    headers of queued work."""
    content = {"application/json": {"schema": schema_of(answer, "serialization")}}
    if chunks:
        content |= stream(*chunks, error)
    description = "The answer, or its chunks with stream=true." if chunks else "The answer."
    return {
        "response_model": None,
        "responses": {
            **errors(error),
            200: {"description": description, "headers": _ANSWERED if queued else {}, "content": content},
        },
        "openapi_extra": {
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema_of(body)}}},
            "parameters": _PARAMETERS if queued else [],
        },
    }
