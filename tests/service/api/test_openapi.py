"""/openapi.json says all there is to know, and is a valid document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from tokenrelay.service.api.schemas.not_built import ON_CHAT
from tokenrelay.service.errors import QueueFull

Json = dict[str, Any]


@pytest.fixture(scope="module")
def document(post: httpx.Client) -> Json:
    served: Json = post.get("/openapi.json").json()
    return served


def operations(document: Json) -> Iterator[Json]:
    for methods in document["paths"].values():
        yield from methods.values()


def with_errors(document: Json) -> list[Json]:
    return [operation for operation in operations(document) if operation["tags"] != ["operations"]]


def test_it_is_valid(document: Json) -> None:
    OpenAPIV31SpecValidator(document).validate()  # unique operation ids included


def test_every_operation_is_described(document: Json) -> None:
    for operation in operations(document):
        assert operation["description"]
        assert operation["operationId"].isidentifier()
        assert all(response["description"] for response in operation["responses"].values())


def test_every_answer_tells_the_requests_id(document: Json) -> None:
    for operation in operations(document):
        assert {"$ref": "#/components/parameters/RequestId"} in operation["parameters"]
        assert all("X-Request-Id" in response["headers"] for response in operation["responses"].values())


def test_every_error_has_a_shape(document: Json) -> None:
    assert with_errors(document)
    for operation in with_errors(document):
        refusals = {status: response for status, response in operation["responses"].items() if status >= "400"}
        assert refusals.keys() >= {"400", "404", "500", "503"}
        assert all("schema" in response["content"]["application/json"] for response in refusals.values())
        assert "Retry-After" in refusals["503"]["headers"]
        assert QueueFull.code in refusals["503"]["description"]


def test_what_reads_a_body_says_how_that_fails(document: Json) -> None:
    for operation in with_errors(document):
        assert ("requestBody" in operation) == ("413" in operation["responses"])


def test_streams_have_the_schema_of_their_chunks(document: Json) -> None:
    content = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    data, done = content["text/event-stream"]["schema"]["properties"]["data"]["anyOf"]
    chunk, error = data["contentSchema"]["anyOf"]
    assert done == {"const": "[DONE]"}
    assert chunk == {"$ref": "#/components/schemas/ChatCompletionChunk"}
    assert error == {"$ref": "#/components/schemas/ErrorBody"}


def test_keys_are_for_all_but_operators(document: Json) -> None:
    assert document["components"]["securitySchemes"]["ApiKey"]["scheme"] == "bearer"
    assert {"ApiKey": []} in document["security"]
    assert all(o["security"] == [] for o in operations(document) if o["tags"] == ["operations"])


def test_bodies_have_all_their_fields(document: Json) -> None:
    content = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    assert content["schema"] == {"$ref": "#/components/schemas/ChatCompletionRequest"}
    properties = document["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert properties.keys() >= {"messages", "stop", "max_completion_tokens"}


def test_what_is_not_built_is_known_with_the_values_that_ask_for_nothing(document: Json) -> None:
    properties = document["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert properties.keys() > ON_CHAT.keys()
    assert all(properties[name]["enum"] == [None, *neutral] for name, neutral in ON_CHAT.items())
