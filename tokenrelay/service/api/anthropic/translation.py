"""From a Messages request to a chat completion's, where all limits hold. Pure functions of the body."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from typing import Any

from tokenrelay.service.api.anthropic.request import (
    CountTokensRequest,
    MessageParam,
    MessagesRequest,
    TextBlockParam,
    ThinkingBlockParam,
    ThinkingParam,
    ToolChoiceParam,
    ToolParam,
    ToolResultBlockParam,
    ToolUseBlockParam,
)
from tokenrelay.service.api.assistant.dialect import Dialect
from tokenrelay.service.api.assistant.thinking import SWITCH, thinking_switch
from tokenrelay.service.api.http.body import validate
from tokenrelay.service.api.schemas.chat import ChatCompletionRequest
from tokenrelay.service.errors import InvalidRequestError

WORDS = {
    r"\bstop\b(?!_)": "stop_sequences",
    r"\bresponse_format\.json_schema\b": "output_config.format",
    r"\btools\.(\d+)\.function\.parameters\b": r"tools.\1.input_schema",
    r"\btools\.(\d+)\.function\b": r"tools.\1",
    r"\btool_choice\.function\b": "tool_choice",
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def as_chat(body: MessagesRequest, dialect: Dialect) -> ChatCompletionRequest:
    """Raises InvalidRequestError."""
    return validate(ChatCompletionRequest, chat_fields(body, dialect))


def as_prompt(body: CountTokensRequest, dialect: Dialect) -> ChatCompletionRequest:
    """Only what the model would read. Raises InvalidRequestError."""
    return validate(ChatCompletionRequest, _set(_prompt(body, dialect)))


def chat_fields(body: MessagesRequest, dialect: Dialect) -> dict[str, Any]:
    """What it says in a chat completion's words."""
    return _set(
        _prompt(body, dialect)
        | {
            "max_tokens": body.max_tokens,
            "stop": body.stop_sequences,
            "temperature": body.temperature,
            "top_k": body.top_k,
            "top_p": body.top_p,
            "stream": body.stream,
            "user": body.metadata and body.metadata.user_id,
            "include_reasoning": False if body.thinking and body.thinking.display == "omitted" else None,
            "response_format": _response_format(body),
        }
    )


def _set(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _prompt(body: CountTokensRequest, dialect: Dialect) -> dict[str, Any]:
    choice = body.tool_choice
    return {
        "model": body.model,
        "messages": [*_system(body), *_conversation(body.messages)],
        "tools": [_tool(tool) for tool in body.tools or ()] or None,
        "tool_choice": _tool_choice(choice) if choice else None,
        "parallel_tool_calls": False if choice and choice.disable_parallel_tool_use else None,
        "continue_final_message": True if body.messages[-1].role == "assistant" else None,
        "chat_template_kwargs": _thinking(body.thinking, dialect) or None,
    }


def _thinking(given: ThinkingParam | None, dialect: Dialect) -> dict[str, Any]:
    if given is None or (given.type == "adaptive" and SWITCH not in dialect.variables):
        return {}
    return thinking_switch(given.type != "disabled", dialect, "thinking")


def _system(body: CountTokensRequest) -> Iterator[dict[str, Any]]:
    if body.system:
        yield {"role": "system", "content": body.system if isinstance(body.system, str) else _joined(body.system)}


def _conversation(messages: Sequence[MessageParam]) -> Iterator[dict[str, Any]]:
    """Turns of the same side are one. Raises InvalidRequestError."""
    for role, turns in groupby(messages, lambda message: message.role):
        blocks = list(chain.from_iterable(turn.blocks for turn in turns))
        yield from [_assistant(blocks)] if role == "assistant" else _user(role, blocks)


def _assistant(blocks: Sequence[Any]) -> dict[str, Any]:
    texts = [block for block in blocks if isinstance(block, TextBlockParam)]
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlockParam)]
    calls = [_call(block) for block in blocks if isinstance(block, ToolUseBlockParam)]
    _require(len(texts) + len(thoughts) + len(calls) == len(blocks), "tool_result", "a user's")
    message: dict[str, Any] = {"role": "assistant", "content": _joined(texts)}
    return message | ({"reasoning_content": "\n".join(thoughts)} if thoughts else {}) | _given("tool_calls", calls)


def _given(name: str, value: Sequence[Any]) -> dict[str, Any]:
    return {name: value} if value else {}


def _call(block: ToolUseBlockParam) -> dict[str, Any]:
    function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
    return {"id": block.id, "type": "function", "function": function}


def _user(role: str, blocks: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Results of tools are messages of their own; what stands between them is another."""
    for is_result, group in groupby(blocks, lambda block: isinstance(block, ToolResultBlockParam)):
        members = list(group)
        if is_result:
            _require(role == "user", "tool_result", "a user's")
            yield from map(_result, members)
        else:
            _require(all(isinstance(block, TextBlockParam) for block in members), "This block", "an assistant's")
            yield {"role": role, "content": _joined(members)}


def _result(block: ToolResultBlockParam) -> dict[str, Any]:
    text = block.content if isinstance(block.content, str) else _joined(block.content)
    content = f"Error: {text}" if block.is_error else text
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}


def _joined(blocks: Sequence[TextBlockParam]) -> str:
    return "\n".join(block.text for block in blocks)


def _require(condition: bool, what: str, whose: str) -> None:
    if not condition:
        raise InvalidRequestError(f"'messages': {what} belongs to {whose} turn.", param="messages")


def _tool(tool: ToolParam) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    optional = {"description": tool.description, "strict": tool.strict}
    given = {name: value for name, value in optional.items() if value is not None}
    return {"type": "function", "function": function | given}


def _tool_choice(choice: ToolChoiceParam) -> str | dict[str, Any]:
    if (choice.type == "tool") != (choice.name is not None):
        raise InvalidRequestError(
            "'tool_choice.name' belongs to type \"tool\", and that to it.", param="tool_choice.name"
        )
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return _CHOICES[choice.type]


def _response_format(body: MessagesRequest) -> dict[str, Any] | None:
    if not body.output_config or not body.output_config.format:
        return None
    schema = {"name": "answer", "schema": body.output_config.format.json_schema}
    return {"type": "json_schema", "json_schema": schema}
