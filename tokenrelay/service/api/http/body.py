"""The only reader of request bodies: bounded, JSON as the RFC has it, then the route's schema.

Whatever a client sends ends in a schema's instance or in a 4xx that names the field; no input is echoed.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn, TypeVar

from fastapi import Request
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from tokenrelay.service.api.event_loop import off_loop_if_large
from tokenrelay.service.api.schemas.request_schema import RequestSchema
from tokenrelay.service.errors import (
    InvalidRequestError,
    RequestTimeout,
    RequestTooLarge,
    UnsupportedMediaType,
    UnsupportedParameter,
)

BODY_SECONDS = 7.0  # a client that takes longer to send its body only holds a connection …
BODY_BYTES_PER_SECOND = 16 << 10  # … unless it sends as much as this
LARGE_BODY = 64 << 10  # bytes
MAX_PARAM_CHARACTERS = 100  # field names come from the client too

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")

Schema = TypeVar("Schema", bound=RequestSchema)


def json_body(schema: type[Schema]) -> Callable[[Request], Awaitable[Schema]]:
    """A dependency that reads the request's body as ``schema``."""

    async def read(request: Request) -> Schema:
        _require_plain_json(request)
        body = await _read_body(request, request.app.state.api.settings.max_body_bytes)
        return await off_loop_if_large(len(body), LARGE_BODY, lambda: validate(schema, parse_json(body)))

    return read


def _require_plain_json(request: Request) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType("Content-Type must be application/json.")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise UnsupportedMediaType("Content-Encoding is not supported; send the body uncompressed.")


async def _read_body(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared[:20]) > limit:
        raise _too_large(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS) as patience:
            latest = patience.when() or 0.0
            async for chunk in request.stream():
                body += chunk
                patience.reschedule(latest + len(body) / BODY_BYTES_PER_SECOND)
                if len(body) > limit:
                    raise _too_large(limit)
    except TimeoutError:
        raise RequestTimeout("The body arrived too slowly.") from None
    return bytes(body)


def _too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"The body is larger than the limit of {limit} bytes; send less.")


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in ``body``. Raises InvalidRequestError, also for what Python's parser would let pass."""
    try:
        parsed = json.loads(body.decode(), parse_constant=_refuse_constant, object_pairs_hook=_unique)
        if _SURROGATE_ESCAPE.search(body):
            json.dumps(parsed, ensure_ascii=False).encode()  # fails for half a surrogate pair
    except UnicodeEncodeError:
        raise _malformed("it has a \\u escape that is half of a surrogate pair") from None
    except UnicodeDecodeError as error:
        raise _malformed(f"byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise _malformed(f"{error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise _malformed("it is nested too deeply") from None
    except ValueError as error:
        raise _malformed(str(error).partition(";")[0]) from None
    if not isinstance(parsed, dict):
        raise _malformed("it must be an object")
    return parsed


def _malformed(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"The body is not valid JSON for this request: {reason}.", code="invalid_json")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("an object has the same field twice")
    return fields


def validate(schema: type[Schema], fields: dict[str, Any]) -> Schema:
    """``fields`` as ``schema``. Raises InvalidRequestError with the path of the field at fault."""
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        raise _refusal(max(problems, key=_depth), fields) from None  # of a union, the branch that got furthest


def _depth(problem: ErrorDetails) -> int:
    return len(problem["loc"])


def _refusal(problem: ErrorDetails, fields: dict[str, Any]) -> InvalidRequestError:
    context = problem.get("ctx", {})
    location = (*problem["loc"], context["name"]) if "name" in context else problem["loc"]
    param = field_path(location, fields)
    if problem["type"] == "unsupported_parameter":
        return UnsupportedParameter(f"'{param}' {problem['msg']}.", param=param)
    if problem["type"] == "extra_forbidden":
        return InvalidRequestError(
            f"'{param}' is not a parameter of this endpoint; remove it (see /docs).",
            param=param,
            code="unknown_parameter",
        )
    if problem["type"] == "missing":
        return InvalidRequestError(f"'{param}' is required.", param=param, code="missing_required_parameter")
    return InvalidRequestError(f"'{param}': {problem['msg']}.", param=param)


def field_path(location: Sequence[int | str], fields: Any) -> str:
    """``messages.0.content`` from pydantic's location, which also names the branches of unions."""
    path: list[str] = []
    for number, step in enumerate(location, 1):
        if isinstance(step, int) and isinstance(fields, list):
            fields = fields[step] if step < len(fields) else None
        elif isinstance(step, str) and isinstance(fields, dict) and (step in fields or number == len(location)):
            fields = fields.get(step)
        else:
            continue
        path.append(str(step))
    return ".".join(path)[:MAX_PARAM_CHARACTERS]
