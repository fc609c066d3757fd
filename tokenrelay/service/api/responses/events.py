"""The events of a response's stream. ``type`` is the name of each; ``sequence_number`` counts from 0."""

from __future__ import annotations

from typing import Literal

from tokenrelay.service.api.responses.objects import (
    FunctionCall,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningText,
    Response,
    Told,
)
from tokenrelay.service.api.schemas.logprobs import ChatTokenLogprob


class StreamEvent(Told):
    type: str
    sequence_number: int


class StateEvent(StreamEvent):
    """The response has reached another state."""

    type: Literal[
        "response.created",
        "response.queued",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: Response


class ItemEvent(StreamEvent):
    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputMessage | FunctionCall | ReasoningItem


class _OfItem(StreamEvent):
    item_id: str
    output_index: int


class _OfPart(_OfItem):
    content_index: int = 0


class PartEvent(_OfPart):
    type: Literal["response.content_part.added", "response.content_part.done"]
    part: OutputText | ReasoningText


class TextDeltaEvent(_OfPart):
    type: Literal["response.output_text.delta"] = "response.output_text.delta"
    delta: str
    logprobs: list[ChatTokenLogprob]


class TextDoneEvent(_OfPart):
    type: Literal["response.output_text.done"] = "response.output_text.done"
    text: str
    logprobs: list[ChatTokenLogprob]


class ReasoningDeltaEvent(_OfPart):
    type: Literal["response.reasoning_text.delta"] = "response.reasoning_text.delta"
    delta: str


class ReasoningDoneEvent(_OfPart):
    type: Literal["response.reasoning_text.done"] = "response.reasoning_text.done"
    text: str


class ArgumentsDeltaEvent(_OfItem):
    type: Literal["response.function_call_arguments.delta"] = "response.function_call_arguments.delta"
    delta: str


class ArgumentsDoneEvent(_OfItem):
    type: Literal["response.function_call_arguments.done"] = "response.function_call_arguments.done"
    name: str
    arguments: str


class ErrorEvent(StreamEvent):
    """The stream ends here, the response perhaps not: ask for it again."""

    type: Literal["error"] = "error"
    code: str
    message: str
    param: str | None = None


RESPONSE_EVENTS: tuple[type[StreamEvent], ...] = (
    StateEvent,
    ItemEvent,
    PartEvent,
    TextDeltaEvent,
    TextDoneEvent,
    ReasoningDeltaEvent,
    ReasoningDoneEvent,
    ArgumentsDeltaEvent,
    ArgumentsDoneEvent,
    ErrorEvent,
)
