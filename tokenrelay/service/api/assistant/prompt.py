"""From a chat's body to what the model's chat template is given.

A template that knows no tools is told of them in the system message, and of earlier calls and their results in the
words that the model is to use.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenrelay.model.structured.tool_calls import ToolCallFormat
from tokenrelay.service.api.assistant.dialect import Dialect
from tokenrelay.service.api.assistant.tool_call_parser import short_id
from tokenrelay.service.api.schemas.chat import ChatCompletionRequest
from tokenrelay.service.api.schemas.messages import ChatMessage
from tokenrelay.service.api.schemas.tools import FunctionTool, MadeCall
from tokenrelay.service.errors import UnsupportedParameter

Message = dict[str, Any]

_THINKING = ("enable_thinking", "thinking")

_INSTRUCTIONS = """You can call functions. These are their descriptions, one a line:
{tools}

To call one, answer with nothing but its name and its arguments, as a JSON object, in this form:
{form}"""


def template_arguments(body: ChatCompletionRequest, dialect: Dialect) -> dict[str, Any]:
    """Arguments of ``Tokenizer.encode_chat``. Raises UnsupportedParameter for what the template does not know."""
    tools = [_described(tool) for tool in body.callable_tools]
    messages = [_message(message, dialect) for message in body.messages]
    if not dialect.knows_tools:
        messages = _in_plain_words(messages, dialect.tools.written)
    if tools and not dialect.knows_tools:
        messages = _with_system(messages, content=_instructions(tools, dialect.tools.written))
    elif tools and dialect.tools_in_system_message:
        messages = _with_system(messages, tools=json.dumps(tools, ensure_ascii=False))
    return {
        "messages": messages,
        "tools": tools if tools and dialect.knows_tools else None,
        "template_kwargs": _further_arguments(body, dialect),
        "add_generation_prompt": body.add_generation_prompt is not False,
        "continue_final_message": bool(body.continue_final_message),
    }


def _further_arguments(body: ChatCompletionRequest, dialect: Dialect) -> dict[str, Any]:
    sent = body.chat_template_kwargs or {}
    given: dict[str, Any] = {name: value for name, value in sent.items() if not _is_so_anyway(name, value, dialect)}
    for name in given.keys() - dialect.variables:
        raise _unknown(f"chat_template_kwargs.{name[:64]}")
    if body.reasoning_effort is None:
        return given
    if "reasoning_effort" in dialect.variables:
        return given | {"reasoning_effort": body.reasoning_effort}
    if body.reasoning_effort == "none" and "enable_thinking" in dialect.variables:
        return given | {"enable_thinking": False}
    raise _unknown("reasoning_effort")


def _is_so_anyway(name: str, value: Any, dialect: Dialect) -> bool:
    """A model that does not think need not be told so."""
    knows = name in dialect.variables or dialect.reasoning_format
    return name in _THINKING and value is False and not knows


def _unknown(param: str) -> UnsupportedParameter:
    return UnsupportedParameter(f"'{param}' is not known to this model's chat template; leave it out.", param=param)


def _described(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.function.model_dump(exclude_unset=True, exclude={"strict"})}


def _message(message: ChatMessage, dialect: Dialect) -> Message:
    """``developer`` is OpenAI's newer name of ``system``, which is the one that open models were trained with."""
    optional = {
        "name": message.name,
        "tool_call_id": _call_id(message.tool_call_id, dialect) if message.tool_call_id else None,
        "reasoning_content": message.thoughts,
        "tool_calls": [_call(call, dialect) for call in message.tool_calls or ()],
    }
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": message.text} | {name: value for name, value in optional.items() if value}


def _call(call: MadeCall, dialect: Dialect) -> Message:
    function = {"name": call.function.name, "arguments": call.arguments}
    return {"id": _call_id(call.id, dialect), "type": "function", "function": function}


def _call_id(given: str, dialect: Dialect) -> str:
    return short_id(given) if dialect.tools.short_ids else given


def _with_system(messages: Sequence[Message], content: str = "", **fields: Any) -> list[Message]:
    """With an addition to the system message, or a new one."""
    first, rest = messages[0], list(messages[1:])
    if first["role"] != "system":
        return [{"role": "system", "content": content, **fields}, *messages]
    both = "\n\n".join(filter(None, (first["content"], content)))
    return [{**first, "content": both, **fields}, *rest]


def _instructions(tools: Sequence[Message], written: ToolCallFormat) -> str:
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return _INSTRUCTIONS.format(tools=lines, form=_written([("NAME", "ARGUMENTS")], written))


def _in_plain_words(messages: Sequence[Message], written: ToolCallFormat) -> list[Message]:
    """Calls as text of the assistant, and their results as one message of the user."""
    told: list[Message] = []
    for message in messages:
        if message["role"] == "tool":
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if told and told[-1].get("results"):
                told[-1]["content"] += f"\n{result}"
            else:
                told.append({"role": "user", "content": result, "results": True})
            continue
        calls = [(call["function"]["name"], _as_text(call)) for call in message.get("tool_calls", ())]
        content = "\n".join(filter(None, (message["content"], _written(calls, written) if calls else "")))
        told.append({name: value for name, value in message.items() if name != "tool_calls"} | {"content": content})
    return [{name: value for name, value in message.items() if name != "results"} for message in told]


def _as_text(call: Message) -> str:
    arguments = call["function"]["arguments"]
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _written(calls: Sequence[tuple[str, str]], form: ToolCallFormat) -> str:
    """Calls by name and arguments, as the model writes them."""
    written = [f"{form.before_name}{n}{form.before_arguments}{a}{form.after_arguments}" for n, a in calls]
    return f"{form.opening}{form.separator.join(written)}{form.closing}"
