"""POST /v1/responses: the request."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from tokenrelay.model.sampling_params import MAX_LOGPROBS, MAX_SEED
from tokenrelay.service.api.responses.items import InputItem, chosen
from tokenrelay.service.api.schemas.chat import MAX_MESSAGES
from tokenrelay.service.api.schemas.not_built import Neutral
from tokenrelay.service.api.schemas.queued import MAX_PRIORITY, MAX_SALT_CHARACTERS, MAX_TIMEOUT_SECONDS
from tokenrelay.service.api.schemas.request_schema import RequestSchema
from tokenrelay.service.api.schemas.sampling import SamplingFields

MAX_METADATA = 16
LOGPROBS = "message.output_text.logprobs"

_ON_RESPONSES: Neutral = {
    "context_management": ([],),
    "conversation": (),
    "max_tool_calls": (),
    "moderation": (),
    "prompt": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in-memory", "in_memory"),
    "truncation": ("disabled",),
}

MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class ResponseFunctionTool(RequestSchema):
    not_built: ClassVar[Neutral] = {"allowed_callers": (), "defer_loading": (False,), "output_schema": ()}

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(RequestSchema):
    type: Literal["function"]
    name: str


class ResponseAllowedTools(RequestSchema):
    """Only these of the tools, in this mode."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1)]


class TextFormat(RequestSchema):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> TextFormat:
        for field, name in (("json_schema", "schema"), ("name", "name")):
            if (self.type == "json_schema") != (getattr(self, field) is not None):
                raise PydanticCustomError("schema_and_type", 'belongs to type "json_schema"', {"name": name})
        return self


class TextFields(RequestSchema):
    not_built: ClassVar[Neutral] = {"verbosity": ("medium",)}

    format: TextFormat | None = None


class ReasoningFields(RequestSchema):
    not_built: ClassVar[Neutral] = {"summary": (), "generate_summary": (), "context": ("auto",), "mode": ("standard",)}

    effort: str | None = Field(None, description="How much to think, where the model's template can be told.")


class ResponseStreamOptions(RequestSchema):
    not_built: ClassVar[Neutral] = {"include_obfuscation": (False,)}


_CHOICES: dict[str, type[RequestSchema]] = {"function": NamedFunction, "allowed_tools": ResponseAllowedTools}
_TOOLS: dict[str, type[RequestSchema]] = {"function": ResponseFunctionTool}
ToolChoice = Literal["none", "auto", "required"] | Annotated[NamedFunction | ResponseAllowedTools, chosen(_CHOICES)]


_ONLY_LOGPROBS: dict[str, JsonValue] = {"items": {"const": LOGPROBS}}  # the validator below says so in better words


class ResponsesRequest(SamplingFields, RequestSchema):
    """Beside OpenAI's parameters, those of this server that say how the next token is chosen."""

    not_built: ClassVar[Neutral] = _ON_RESPONSES

    model: str = Field(description="The served model's name, as in GET /v1/models.")
    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] = Field(
        description="A text, or items: messages, calls, their outputs, thoughts, references to stored items."
    )
    instructions: str | None = Field(None, description="A system message before the input, for this response only.")
    previous_response_id: str | None = Field(None, description="Go on behind this response's input and output.")
    max_output_tokens: int | None = Field(None, ge=1, description="Most tokens to generate, thoughts included.")
    text: TextFields | None = None
    tools: list[Annotated[ResponseFunctionTool, chosen(_TOOLS)]] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = Field(None, description="Default true.")
    reasoning: ReasoningFields | None = None
    include: Annotated[list[str], Field(max_length=16, json_schema_extra=_ONLY_LOGPROBS)] | None = Field(
        None, description=f'["{LOGPROBS}"]: tell how likely the tokens are.'
    )
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description=f"And so many alternatives. Default 0. Only with {LOGPROBS}."
    )
    store: bool | None = Field(None, description="Keep it, to be read and continued by its id. Default true.")
    background: bool | None = Field(None, description="Answer at once, and go on without a client. Default false.")
    stream: bool | None = Field(None, description="Answer as server-sent events. Default false.")
    stream_options: ResponseStreamOptions | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=MAX_METADATA)] | None = None
    user: str | None = Field(None, description="Your end user; has no effect here.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Equal seeds give equal tokens. Default: random.")
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="Lower is served sooner.")
    cache_salt: str | None = Field(None, min_length=1, max_length=MAX_SALT_CHARACTERS)
    service_tier: Literal["auto", "default", "flex", "priority"] | None = Field(
        None, description="flex: after the others; priority: before them."
    )
    prompt_cache_key: str | None = Field(None, description="Has no effect here: equal prompts always share the cache.")
    safety_identifier: str | None = Field(None, description="Your end user; has no effect here.")
    timeout: float | None = Field(None, gt=0, le=MAX_TIMEOUT_SECONDS, description="Seconds until it must be done.")

    @property
    def stores(self) -> bool:
        return self.store is not False

    @property
    def tells_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    @model_validator(mode="after")
    def _includes_what_there_is(self) -> ResponsesRequest:
        if set(self.include or ()) - {LOGPROBS}:
            raise PydanticCustomError(
                "unsupported_parameter", f"may only hold {LOGPROBS!r} on this server", {"name": "include"}
            )
        if self.top_logprobs and not self.tells_logprobs:
            raise PydanticCustomError(
                "no_logprobs", f"is only allowed with include={[LOGPROBS]}", {"name": "top_logprobs"}
            )
        return self

    @model_validator(mode="after")
    def _kept_if_nobody_waits(self) -> ResponsesRequest:
        if self.background and not self.stores:
            raise PydanticCustomError("not_stored", "is only allowed with store=true", {"name": "background"})
        return self
