"""The messages of a chat, as a client sends them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from tokenrelay.service.api.schemas.not_built import IN_MESSAGES, Neutral
from tokenrelay.service.api.schemas.request_schema import RequestSchema
from tokenrelay.service.api.schemas.tools import MAX_CALLS, MAX_ID_CHARACTERS, MadeCall

MAX_PARTS = 256

_OTHER_PARTS = {
    "image_url": "an image",
    "input_image": "an image",
    "image": "an image",
    "input_audio": "audio",
    "audio_url": "audio",
    "video_url": "a video",
    "file": "a file",
}


class TextPart(RequestSchema):
    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind in _OTHER_PARTS:
            raise PydanticCustomError(
                "not_text", "is {what}, and this model reads only text", {"what": _OTHER_PARTS[kind]}
            )
        return part


class ChatMessage(RequestSchema):
    not_built: ClassVar[Neutral] = IN_MESSAGES

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)] | None = Field(
        None, description="May only be null beside tool_calls."
    )
    name: str | None = Field(None, description="Who speaks; used by chat templates that know it.")
    tool_calls: Annotated[list[MadeCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = Field(
        None, description="The calls that the assistant made."
    )
    tool_call_id: Annotated[str, Field(max_length=MAX_ID_CHARACTERS)] | None = Field(
        None, description="The call a tool message answers."
    )
    reasoning_content: str | None = Field(None, description="What the assistant thought; for templates that know it.")
    reasoning: str | None = Field(None, description="The same, under vLLM's name.")

    @property
    def text(self) -> str:
        """Text parts are joined by line breaks, as other servers do."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "\n".join(part.text for part in self.content)

    @property
    def thoughts(self) -> str:
        return self.reasoning_content or self.reasoning or ""

    @property
    def size(self) -> int:
        """Characters, about."""
        calls = sum(len(call.function.arguments) for call in self.tool_calls or ())
        return len(self.text) + len(self.thoughts) + calls + 64

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("not_its_call", "only an assistant makes them", {"name": "tool_calls"})
        if self.content is None and not self.tool_calls and not self.thoughts:
            raise PydanticCustomError("no_content", "is required, as a string or as text parts", {"name": "content"})
        return self
