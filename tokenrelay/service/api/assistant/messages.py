"""Deltas in the fields of a chat completion's message, and of its chunks."""

from __future__ import annotations

from collections.abc import Sequence

from tokenrelay.service.api.assistant.deltas import Delta, ReasoningDelta, TextDelta, ToolCallDelta
from tokenrelay.service.api.schemas.chat import (
    AnswerMessage,
    CalledFunction,
    FunctionDelta,
    MessageDelta,
    ToolCall,
    ToolCallChunk,
)


def chunk_delta(delta: Delta) -> MessageDelta:
    """As a stream tells it. Only fields that are set are sent."""
    if isinstance(delta, TextDelta):
        return MessageDelta(content=delta.text)
    if isinstance(delta, ReasoningDelta):
        return MessageDelta(reasoning_content=delta.text)
    if not delta.id:
        call = ToolCallChunk(index=delta.index, function=FunctionDelta(arguments=delta.arguments))
    else:
        function = FunctionDelta(name=delta.name, arguments=delta.arguments)
        call = ToolCallChunk(index=delta.index, id=delta.id, type="function", function=function)
    return MessageDelta(tool_calls=[call])


def answer_message(deltas: Sequence[Delta]) -> AnswerMessage:
    """The whole of it. There is no content beside calls unless something was written there."""
    text = "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))
    reasoning = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
    calls = tool_calls([delta for delta in deltas if isinstance(delta, ToolCallDelta)])
    message = AnswerMessage(role="assistant", content=text or (None if calls else ""), refusal=None)
    told = {"reasoning_content": reasoning or None, "tool_calls": calls or None}
    return message.model_copy(update={name: value for name, value in told.items() if value})


def tool_calls(deltas: Sequence[ToolCallDelta]) -> list[ToolCall]:
    """Whole calls, in their order."""
    arguments: dict[int, list[str]] = {}
    for delta in deltas:
        arguments.setdefault(delta.index, []).append(delta.arguments)
    return [
        ToolCall(id=first.id, type="function", function=CalledFunction(name=first.name, arguments="".join(pieces)))
        for first, pieces in zip((delta for delta in deltas if delta.id), arguments.values(), strict=True)
    ]
