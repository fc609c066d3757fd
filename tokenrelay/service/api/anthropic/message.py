"""POST /v1/messages: the answer, and the events of a stream. Only fields that were set are sent."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class TextBlock(BaseModel):
    type: Literal["text"]
    text: str


class ThinkingBlock(BaseModel):
    """Nothing is signed here, but clients expect a signature."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseBlock(BaseModel):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


ContentBlock = TextBlock | ThinkingBlock | ToolUseBlock


class MessageUsage(BaseModel):
    """``input_tokens`` without those read from the prefix cache."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class AnthropicMessage(BaseModel):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ContentBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class InputTokens(BaseModel):
    """The answer of /v1/messages/count_tokens."""

    input_tokens: int


class MessageStart(BaseModel):
    type: Literal["message_start"]
    message: AnthropicMessage


class ContentBlockStart(BaseModel):
    type: Literal["content_block_start"]
    index: int
    content_block: ContentBlock


class TextDeltaPart(BaseModel):
    type: Literal["text_delta"]
    text: str


class ThinkingDeltaPart(BaseModel):
    type: Literal["thinking_delta"]
    thinking: str


class InputJsonDeltaPart(BaseModel):
    type: Literal["input_json_delta"]
    partial_json: str


class ContentBlockDelta(BaseModel):
    type: Literal["content_block_delta"]
    index: int
    delta: TextDeltaPart | ThinkingDeltaPart | InputJsonDeltaPart


class ContentBlockStop(BaseModel):
    type: Literal["content_block_stop"]
    index: int


class MessageEnd(BaseModel):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDeltaEvent(BaseModel):
    type: Literal["message_delta"]
    delta: MessageEnd
    usage: MessageUsage


class MessageStop(BaseModel):
    type: Literal["message_stop"]


class Ping(BaseModel):
    """While nothing else comes."""

    type: Literal["ping"]


MessageEvent = MessageStart | ContentBlockStart | ContentBlockDelta | ContentBlockStop | MessageDeltaEvent | MessageStop
MESSAGE_EVENTS: tuple[type[BaseModel], ...] = (*get_args(MessageEvent), Ping)
