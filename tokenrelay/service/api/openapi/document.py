"""``/openapi.json``: what FastAPI gathers from the routes, and what all of them have in common."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from tokenrelay import __version__
from tokenrelay.service.api.http.request_id import HEADER as REQUEST_ID
from tokenrelay.service.api.openapi.operation import ERRORS, header, parameter

DESCRIPTION = """An LLM inference server whose streams survive the death of any of its processes.

Its routes are those of OpenAI's API, which also answer without `/v1`, and some of its own. Every error has OpenAI's
shape, a message that says the remedy, and headers that say whether and when to try again."""

OPERATIONS = "operations"  # the tag of routes that ask for no key and refuse nothing
_COMPONENTS = {
    "parameters": {"RequestId": parameter(REQUEST_ID, "Your name of the request, for your logs and ours.")},
    "headers": {"RequestId": header("What the request is called in the logs: your name of it, if it has one.")},
    "securitySchemes": {
        "ApiKey": {"type": "http", "scheme": "bearer", "description": "An API key, if the server has any."}
    },
}
_OF_BODIES = {"408", "413", "415", "422", "499", "504"}  # statuses that only a request with a body meets
_FASTAPIS = {"HTTPValidationError", "ValidationError"}

Json = dict[str, Any]


def add_openapi(app: FastAPI) -> None:
    def openapi() -> Json:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI) -> Json:
    document = get_openapi(title=app.title, version=__version__, description=DESCRIPTION, routes=app.routes)
    document["info"]["license"] = {"name": "Apache-2.0", "identifier": "Apache-2.0"}
    document |= {"servers": [{"url": "/"}], "security": [{"ApiKey": []}, {}]}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            operation["operationId"] = _short(operation["operationId"], path, method)
            _complete(operation)
    document["components"] |= _COMPONENTS
    document["components"]["schemas"] = _schemas(document)
    return document


def _short(operation_id: str, path: str, method: str) -> str:
    """The function's name, without the path and the method that FastAPI appends."""
    return operation_id.removesuffix(f"_{method}").removesuffix(re.sub(r"\W", "_", path))


def _complete(operation: Json) -> None:
    if OPERATIONS in operation["tags"]:
        operation["security"] = []
    else:
        operation["responses"] = _with_errors(operation)
    operation.setdefault("parameters", []).append({"$ref": "#/components/parameters/RequestId"})
    for response in operation["responses"].values():
        response["headers"] = {REQUEST_ID: {"$ref": "#/components/headers/RequestId"}, **response.get("headers", {})}


def _with_errors(operation: Json) -> Json:
    """What it says of them itself, and otherwise the usual."""
    usual = {str(status): dict(response) for status, response in ERRORS.items()}
    own = {status: response for status, response in operation["responses"].items() if not _is_fastapis(response)}
    responses = usual | own
    if "requestBody" not in operation:
        responses = {status: response for status, response in responses.items() if status not in _OF_BODIES}
    return dict(sorted(responses.items()))


def _is_fastapis(response: Json) -> bool:
    return any(f"/{name}" in str(response) for name in _FASTAPIS)


def _schemas(document: Json) -> Json:
    """Those that FastAPI found, and those that stand beside the references to them."""
    found = dict(document["components"]["schemas"])
    for holder in _objects(document["paths"]):
        for name, schema in holder.pop("$defs", {}).items():
            if found.setdefault(name, schema) != schema:
                raise ValueError(f"Two schemas are called {name}.")
    return {name: found[name] for name in sorted(found.keys() - _FASTAPIS)}


def _objects(node: Any) -> Iterator[Json]:
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _objects(child)
