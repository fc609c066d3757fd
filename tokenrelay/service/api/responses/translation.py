"""From a Responses request to a chat completion's, where all limits hold, and from that one's words back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenrelay.service.api.http.body import validate
from tokenrelay.service.api.http.rewording import told_in
from tokenrelay.service.api.responses.conversation import Item, as_messages
from tokenrelay.service.api.responses.objects import Echo, Reasoning
from tokenrelay.service.api.responses.request import (
    NamedFunction,
    ResponseAllowedTools,
    ResponseFunctionTool,
    ResponsesRequest,
    TextFormat,
    ToolChoice,
)
from tokenrelay.service.api.schemas.chat import ChatCompletionRequest
from tokenrelay.service.api.schemas.sampling import SamplingFields

_AS_THEY_ARE = (
    *SamplingFields.model_fields,
    *("model", "stream", "user", "metadata", "seed", "priority", "cache_salt", "timeout", "parallel_tool_calls"),
    *("service_tier", "prompt_cache_key", "safety_identifier"),
)
WORDS = {
    r"\bmessages(\.\w+)*": "input",
    r"\bmax(_completion)?_tokens\b": "max_output_tokens",
    r"\bresponse_format\.json_schema\b": "text.format",
    r"\bresponse_format\b": "text.format",
    r"\btools\.(\d+)\.function\b": r"tools.\1",
    r"\btool_choice\.(function|allowed_tools)\b": "tool_choice",
    r"\breasoning_effort\b": "reasoning.effort",
}


def as_chat(body: ResponsesRequest, conversation: Sequence[Item]) -> ChatCompletionRequest:
    """The same as a chat completion. Raises InvalidRequestError."""
    fields = {name: getattr(body, name) for name in _AS_THEY_ARE}
    instructions = [{"role": "system", "content": body.instructions}] if body.instructions else []
    fields |= {
        "messages": [*instructions, *as_messages(conversation)],
        "max_completion_tokens": body.max_output_tokens,
        "logprobs": body.tells_logprobs or None,
        "top_logprobs": body.top_logprobs,
        "response_format": _response_format(body.text.format) if body.text and body.text.format else None,
        "tools": [_tool(tool) for tool in body.tools or ()] or None,
        "tool_choice": _tool_choice(body.tool_choice),
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
        "on_disconnect": "continue" if body.background else None,
    }
    with told_in(WORDS):
        return validate(ChatCompletionRequest, {name: value for name, value in fields.items() if value is not None})


def _response_format(given: TextFormat) -> dict[str, Any]:
    if given.type != "json_schema":
        return {"type": given.type}
    schema = {"name": given.name, "schema": given.json_schema}
    optional = {"description": given.description, "strict": given.strict}
    return {"type": "json_schema", "json_schema": schema | {k: v for k, v in optional.items() if v is not None}}


def _tool(tool: ResponseFunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _tool_choice(choice: ToolChoice | None) -> str | dict[str, Any] | None:
    if isinstance(choice, NamedFunction):
        return _named(choice)
    if isinstance(choice, ResponseAllowedTools):
        return {
            "type": choice.type,
            choice.type: {"mode": choice.mode, "tools": [_named(tool) for tool in choice.tools]},
        }
    return choice


def _named(tool: NamedFunction) -> dict[str, Any]:
    return {"type": "function", "function": {"name": tool.name}}


def echo(body: ResponsesRequest) -> dict[str, Any]:
    """What the response repeats of its request, with the defaults that held."""
    text = body.text.format.model_dump(by_alias=True, exclude_none=True) if body.text and body.text.format else None
    choice = body.tool_choice if isinstance(body.tool_choice, str | None) else body.tool_choice.model_dump()
    return Echo(
        background=bool(body.background),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        prompt_cache_key=body.prompt_cache_key,
        reasoning=Reasoning(effort=body.reasoning.effort if body.reasoning else None),
        safety_identifier=body.safety_identifier,
        service_tier="default" if body.service_tier in (None, "auto") else body.service_tier,
        store=body.stores,
        temperature=1.0 if body.temperature is None else body.temperature,
        text={"format": text or {"type": "text"}},
        tool_choice=choice or "auto",
        tools=[tool.model_dump() for tool in body.tools or ()],
        top_logprobs=body.top_logprobs or 0,
        top_p=1.0 if body.top_p is None else body.top_p,
        user=body.user,
    ).model_dump()
