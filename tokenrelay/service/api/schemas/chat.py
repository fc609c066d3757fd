"""POST /v1/chat/completions: the request, the answer and the chunk of a stream."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from tokenrelay.model.sampling_params import MAX_LOGPROBS
from tokenrelay.service.api.schemas.interim import InterimFields
from tokenrelay.service.api.schemas.logprobs import ChatLogprobs, PromptLogprobs
from tokenrelay.service.api.schemas.messages import ChatMessage
from tokenrelay.service.api.schemas.not_built import ON_CHAT, Neutral
from tokenrelay.service.api.schemas.request import GenerationRequest
from tokenrelay.service.api.schemas.tools import ToolFields
from tokenrelay.service.api.schemas.usage import CompletionUsage, Timings

MAX_MESSAGES = 4096
MAX_TEMPLATE_ARGUMENTS = 16
MAX_TEMPLATE_CHARACTERS = 1024  # of one argument

TemplateText = Annotated[str, Field(max_length=MAX_TEMPLATE_CHARACTERS)]
TemplateArgument = TemplateText | bool | int | float | None
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class ChatCompletionRequest(GenerationRequest, ToolFields):
    not_built: ClassVar[Neutral] = ON_CHAT

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    reasoning_effort: Effort | None = Field(None, description="For templates that know it; others refuse it.")
    include_reasoning: bool | None = Field(None, description="Tell the reasoning, too. Default true.")
    separate_reasoning: bool | None = Field(None, description="Split the reasoning from the content. Default true.")
    chat_template_kwargs: Annotated[dict[str, TemplateArgument], Field(max_length=MAX_TEMPLATE_ARGUMENTS)] | None = (
        Field(None, description="Further arguments of the model's chat template, such as enable_thinking.")
    )
    add_generation_prompt: bool | None = Field(None, description="Begin the assistant's turn. Default true.")
    continue_final_message: bool | None = Field(
        None, description="Go on with the last message instead of beginning another. Default false."
    )
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer name of max_tokens.")
    logprobs: bool | None = Field(None, description="Tell how likely the tokens are. Default false.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="And so many alternatives. Default 0. Only with logprobs=true."
    )

    @model_validator(mode="after")
    def _one_limit(self) -> ChatCompletionRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError(
                "two_limits", "contradicts max_tokens; send one of them", {"name": "max_completion_tokens"}
            )
        return self

    @model_validator(mode="after")
    def _alternatives_to_something(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("no_logprobs", "is only allowed with logprobs=true", {"name": "top_logprobs"})
        return self

    @model_validator(mode="after")
    def _one_way_to_begin(self) -> ChatCompletionRequest:
        if self.continue_final_message and self.add_generation_prompt:
            raise PydanticCustomError(
                "two_beginnings", "contradicts add_generation_prompt=true", {"name": "continue_final_message"}
            )
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or super().token_limit

    @property
    def is_shaped(self) -> bool:
        """Whether a grammar decides what the text may be."""
        return self.structure is not None or self.must_call

    @property
    def parses_calls(self) -> bool:
        """Whether calls of tools may stand in the text: not where it must be something else."""
        return bool(self.callable_tools) and (self.must_call or self.structure is None)

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CalledFunction(BaseModel):
    name: str
    arguments: str = Field(description="JSON, as the model wrote it.")


class ToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None = Field(description="Null if there is nothing beside calls of tools.")
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage
    system_fingerprint: str | None = None
    service_tier: str | None = None
    timings: Timings | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class FunctionDelta(BaseModel):
    name: str | None = None
    arguments: str


class ToolCallChunk(BaseModel):
    """A piece of call ``index``: first its id and name, then its arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class MessageDelta(BaseModel):
    """Only the fields that were set are sent."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallChunk] | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class ChatCompletionChunk(InterimFields):
    """What is told of the prompt comes with the first chunk."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: CompletionUsage | None = None
    system_fingerprint: str | None = None
    service_tier: str | None = None
    timings: Timings | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None
