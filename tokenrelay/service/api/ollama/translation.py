"""From Ollama's requests to a chat completion's or a completion's, where all limits hold. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from tokenrelay.service.api.assistant.dialect import Dialect
from tokenrelay.service.api.assistant.thinking import thinking_switch
from tokenrelay.service.api.http.body import validate
from tokenrelay.service.api.ollama.request import (
    CallParam,
    OllamaChatRequest,
    OllamaGenerateRequest,
    OllamaMessageParam,
    OllamaOptions,
)
from tokenrelay.service.api.schemas.chat import ChatCompletionRequest
from tokenrelay.service.api.schemas.completions import CompletionRequest

LATEST = ":latest"
EFFORT = "reasoning_effort"
WORDS = {
    r"\bmax_tokens\b": "options.num_predict",
    r"\bresponse_format(\.json_schema\.schema)?\b": "format",
    r"(^|')(temperature|(?:top|min|typical)_[kp]|seed|stop|\w+_penalty|mirostat(?:_tau|_eta)?)(?='|$)": r"\1options.\2",
}
_AS_THEY_ARE = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "stop"),
    *("repeat_penalty", "presence_penalty", "frequency_penalty", "mirostat", "mirostat_tau", "mirostat_eta"),
)


def named(asked: str, served: str) -> str:
    """What a client asks for, with or without Ollama's default tag: the served model's name, or an adapter's."""
    return served if asked.removesuffix(LATEST) == served.removesuffix(LATEST) else asked.removesuffix(LATEST)


def chat_of(body: OllamaChatRequest, served: str, dialect: Dialect) -> ChatCompletionRequest:
    """Raises InvalidRequestError."""
    return validate(ChatCompletionRequest, chat_fields(body, served, dialect))


def chat_fields(body: OllamaChatRequest, served: str, dialect: Dialect) -> dict[str, Any]:
    """What it says in a chat completion's words."""
    fields = _conversation_fields(body, dialect) | {
        "messages": list(_messages(body.messages)),
        "tools": body.tools or None,
    }
    return _set(fields | {"model": named(body.model, served)})


def generation_fields(body: OllamaGenerateRequest, served: str, dialect: Dialect) -> dict[str, Any]:
    """The same for a prompt that is one message."""
    system = [{"role": "system", "content": body.system}] if body.system else []
    fields = {"messages": [*system, {"role": "user", "content": body.prompt}], "model": named(body.model, served)}
    return _set(_conversation_fields(body, dialect) | fields)


def generation_of(body: OllamaGenerateRequest, served: str, dialect: Dialect) -> ChatCompletionRequest:
    """Raises InvalidRequestError."""
    return validate(ChatCompletionRequest, generation_fields(body, served, dialect))


def raw_of(body: OllamaGenerateRequest, served: str, most: int) -> CompletionRequest:
    """A prompt without a template. ``most`` tokens, if it names no number. Raises InvalidRequestError."""
    fields = _fields(body) | {"prompt": body.prompt, "model": named(body.model, served)}
    fields["logprobs"] = (body.top_logprobs or 0) if body.logprobs else None
    fields["max_tokens"] = fields["max_tokens"] or most
    return validate(CompletionRequest, _set(fields))


def _conversation_fields(body: OllamaChatRequest | OllamaGenerateRequest, dialect: Dialect) -> dict[str, Any]:
    return _fields(body) | {
        **_thinking(body.think, dialect),
        "logprobs": body.logprobs,
        "top_logprobs": body.top_logprobs,
    }


def _thinking(wanted: bool | str | None, dialect: Dialect) -> dict[str, Any]:
    if wanted is None:
        return {}
    if isinstance(wanted, str) and EFFORT in dialect.variables:
        return {EFFORT: wanted}
    return {"chat_template_kwargs": thinking_switch(bool(wanted), dialect, "think") or None}


def _fields(body: OllamaChatRequest | OllamaGenerateRequest) -> dict[str, Any]:
    options = body.options or OllamaOptions()
    return {name: getattr(options, name) for name in _AS_THEY_ARE} | {
        "seed": None if options.seed == -1 else options.seed,
        "max_tokens": None if (options.num_predict or 0) < 0 else options.num_predict,
        "stream": body.stream is not False,
        "timings_per_token": True,
        "response_format": _response_format(body.format),
    }


def _response_format(given: str | dict[str, Any] | None) -> dict[str, Any] | None:
    if isinstance(given, dict):
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": given}}
    return {"type": "json_object"} if given else None


def _messages(messages: Sequence[OllamaMessageParam]) -> Iterator[dict[str, Any]]:
    """Ollama's calls need no ids: results belong to the first call of that name that has none yet."""
    unanswered: list[tuple[str, str]] = []  # name, id
    for number, message in enumerate(messages):
        calls = [_call(call, f"call_{number}_{i}") for i, call in enumerate(message.tool_calls or ())]
        unanswered += [(call["function"]["name"], call["id"]) for call in calls]
        optional = {
            "reasoning_content": message.thinking,
            "tool_calls": calls,
            "name": message.tool_name,
            "tool_call_id": _answered(message, unanswered) if message.role == "tool" else None,
        }
        yield {"role": message.role, "content": message.content} | {k: v for k, v in optional.items() if v}


def _call(call: CallParam, otherwise: str) -> dict[str, Any]:
    arguments = json.dumps(call.function.arguments, ensure_ascii=False)
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id or otherwise, "type": "function", "function": function}


def _answered(message: OllamaMessageParam, unanswered: list[tuple[str, str]]) -> str | None:
    if message.tool_call_id:
        return message.tool_call_id
    for i, (name, _) in enumerate(unanswered):
        if message.tool_name in (None, name):
            return unanswered.pop(i)[1]
    return None


def _set(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
