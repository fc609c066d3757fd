"""POST /v1/messages and /v1/messages/count_tokens: what a client sends."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from tokenrelay.service.api.schemas.chat import MAX_MESSAGES
from tokenrelay.service.api.schemas.messages import MAX_PARTS
from tokenrelay.service.api.schemas.not_built import Neutral
from tokenrelay.service.api.schemas.request import MAX_STOP_STRINGS, StopString
from tokenrelay.service.api.schemas.request_schema import RequestSchema
from tokenrelay.service.api.schemas.sampling import PositiveProbability, Temperature, TopK
from tokenrelay.service.api.schemas.tools import MAX_TOOLS

_NO_EFFECT = "Has no effect: equal beginnings of prompts are always cached, and cost nothing."
_IN_BODIES: Neutral = {
    "container": (),
    "context_management": ({},),
    "diagnostics": (),
    "inference_geo": (),
    "mcp_servers": ([],),
    "speed": ("standard",),
    "user_profile_id": (),
    "workspace_id": (),
}


class CacheControl(RequestSchema):
    type: Literal["ephemeral"]
    ttl: str | None = None


class _Cacheable(RequestSchema):
    cache_control: CacheControl | None = Field(None, description=_NO_EFFECT)


class TextBlockParam(_Cacheable):
    not_built: ClassVar[Neutral] = {"citations": ([],)}

    type: Literal["text"]
    text: str


class ThinkingBlockParam(RequestSchema):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = Field(None, description="Has no effect: nothing is signed here.")


class ToolUseBlockParam(_Cacheable):
    not_built: ClassVar[Neutral] = {"caller": ({"type": "direct"},), "toolset_name": ()}

    type: Literal["tool_use"]
    id: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(min_length=1)]
    input: dict[str, Any]


def _only_text(block: Any) -> Any:
    """Of blocks that are not built, the type is told; what it holds is not even looked at."""
    kind = block.get("type") if isinstance(block, dict) else None
    if kind in ("image", "document", "audio", "video", "container_upload", "search_result"):
        raise PydanticCustomError("no_such_block", "this model reads text only; send text", {"name": "type"})
    if isinstance(block, dict) and kind not in ("text", "thinking", "tool_use", "tool_result"):
        raise PydanticCustomError(
            "unsupported_block", "must be text, thinking, tool_use or tool_result", {"name": "type"}
        )
    return block


_Texts = Annotated[
    list[Annotated[TextBlockParam, BeforeValidator(_only_text)]], Field(max_length=MAX_PARTS, fail_fast=True)
]


class ToolResultBlockParam(_Cacheable):
    not_built: ClassVar[Neutral] = {"toolset_name": ()}

    type: Literal["tool_result"]
    tool_use_id: Annotated[str, Field(min_length=1)]
    content: str | _Texts = ""
    is_error: bool | None = Field(None, description='The model reads "Error: " before the content.')


ContentBlockParam = Annotated[
    Annotated[
        TextBlockParam | ThinkingBlockParam | ToolUseBlockParam | ToolResultBlockParam, Field(discriminator="type")
    ],
    BeforeValidator(_only_text),
]
_Blocks = Annotated[list[ContentBlockParam], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]


class MessageParam(RequestSchema):
    role: Literal["user", "assistant", "system"]
    content: str | _Blocks

    @property
    def blocks(self) -> list[TextBlockParam | ThinkingBlockParam | ToolUseBlockParam | ToolResultBlockParam]:
        """A string is short for one block of text."""
        return [TextBlockParam(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class ToolParam(_Cacheable):
    not_built: ClassVar[Neutral] = {
        "allowed_callers": (["direct"],),
        "defer_loading": (False,),
        "eager_input_streaming": (True, False),
        "input_examples": ([],),
    }

    type: Literal["custom"] | None = None
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class ToolChoiceParam(RequestSchema):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(None, description='The tool to use; belongs to type "tool".')
    disable_parallel_tool_use: bool | None = None


class ThinkingParam(RequestSchema):
    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = Field(None, ge=1, description="Has no effect: max_tokens bounds thinking and answer.")
    display: Literal["summarized", "omitted"] | None = Field(None, description="omitted: thinking is not told.")


class JsonOutputFormat(RequestSchema):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(RequestSchema):
    not_built: ClassVar[Neutral] = {"effort": ("high",)}

    format: JsonOutputFormat | None = None


class Metadata(RequestSchema):
    user_id: str | None = Field(None, description="Your end user; has no effect here.")


class CountTokensRequest(RequestSchema):
    not_built: ClassVar[Neutral] = _IN_BODIES

    model: str = Field(description="The served model's name, as in GET /v1/models.")
    messages: Annotated[list[MessageParam], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: str | _Texts | None = None
    tools: Annotated[list[ToolParam], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoiceParam | None = None
    thinking: ThinkingParam | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = Field(None, description=_NO_EFFECT)


class MessagesRequest(CountTokensRequest):
    max_tokens: int = Field(ge=1, description="Most tokens to generate; where less room is left, so much.")
    stop_sequences: Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None = None
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: PositiveProbability | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = Field(None, description="There is one tier.")
