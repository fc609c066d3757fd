"""Every error leaves in its protocol's shape, with the headers that tell a client whether and when to try again."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from tokenrelay.service.api.event_loop import ClientGone
from tokenrelay.service.api.http.error_shapes import error_body
from tokenrelay.service.api.http.request_id import id_headers
from tokenrelay.service.api.lifecycle.generation import GenerationFailed
from tokenrelay.service.errors import InvalidRequestError, ServiceError

DEFAULT_RETRY_AFTER = 1.0  # seconds
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
MAX_RETRY_AFTER = 120.0  # openai's client takes a longer wait for none at all


def add_error_handlers(app: FastAPI) -> None:
    for kind, handler in (
        (ServiceError, _refused),
        (GenerationFailed, _failed),
        (HTTPException, _http_error),
        (RequestValidationError, _invalid),
        (ClientGone, _gone),
        (ClientDisconnect, _gone),
        (Exception, _unexpected),
    ):
        app.add_exception_handler(kind, handler)  # type: ignore[arg-type]


def error_response(
    error: ServiceError, path: str = "", *, status: int | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """``path``: of the request, which says in what shape."""
    status = status or error.status
    headers = {**retry_headers(error), **error.headers, **(headers or {})}
    return JSONResponse(error_body(error, status, path), status, headers)


def retry_headers(error: ServiceError) -> dict[str, str]:
    """OpenAI's clients read all three; without the last they would retry every 500."""
    if not error.retryable:
        return {"x-should-retry": "false"}
    seconds = min(error.retry_after or DEFAULT_RETRY_AFTER, MAX_RETRY_AFTER)
    return {
        "Retry-After": str(math.ceil(seconds)),
        "retry-after-ms": str(math.ceil(seconds * 1000)),
        "x-should-retry": "true",
    }


async def _refused(request: Request, error: ServiceError) -> Response:
    request.app.state.api.metrics.refused(error.code)
    return error_response(error, request.scope["path"])


async def _failed(request: Request, failure: GenerationFailed) -> Response:
    """Not a refusal: the request was accepted, and its outcome is counted."""
    return error_response(failure.error, request.scope["path"])


async def _http_error(request: Request, error: HTTPException) -> Response:
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_allowed(request))
    path = f"{request.method} {request.scope['path'][:200]}"
    message, code = {
        404: (f"There is no route {path}; see /docs.", "not_found"),
        405: (f"{path} is not allowed; see the Allow header.", "method_not_allowed"),
    }.get(error.status_code, (str(error.detail), "invalid_request"))
    refusal = InvalidRequestError(message, code=code)
    return error_response(refusal, request.scope["path"], status=error.status_code, headers=headers)


def _allowed(request: Request) -> list[str]:
    """Of all routes of the path: the router tells of the first one only."""
    scopes = {method: {**request.scope, "method": method} for method in METHODS}
    return [
        method
        for method, scope in scopes.items()
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)
    ]


async def _invalid(request: Request, error: RequestValidationError) -> Response:
    refusal = InvalidRequestError("The request's path or query is not valid; see /docs.")
    return error_response(refusal, request.scope["path"])


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # reaches nobody


async def _unexpected(request: Request, error: Exception) -> Response:
    """Starlette answers with this above all middleware, so the request's id is added here."""
    failure = ServiceError("The server failed; the error was logged.")
    return error_response(failure, request.scope["path"], headers=id_headers(request.scope))
