"""What the Responses API answers with: the response, the items of its output, and lists of items."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from tokenrelay.service.api.schemas.logprobs import ChatTokenLogprob

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class Told(BaseModel):
    """Every field is sent, also a null: clients count on its being there."""

    def model_post_init(self, context: Any) -> None:
        self.model_fields_set.update(type(self).model_fields)


class OutputText(Told):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[None] = []
    logprobs: list[ChatTokenLogprob] = Field([], description="Only with include=['message.output_text.logprobs'].")


class ReasoningText(Told):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class OutputMessage(Told):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: ItemStatus
    content: list[OutputText]


class FunctionCall(Told):
    id: str
    type: Literal["function_call"] = "function_call"
    call_id: str
    name: str
    arguments: str = Field(description="JSON text, as the model wrote it.")
    status: ItemStatus


class ReasoningItem(Told):
    id: str
    type: Literal["reasoning"] = "reasoning"
    summary: list[None] = []
    content: list[ReasoningText]
    encrypted_content: None = None
    status: ItemStatus


OutputItem = Annotated[OutputMessage | FunctionCall | ReasoningItem, Field(discriminator="type")]


class ResponseError(Told):
    """Why the response failed. OpenAI has few codes; the message says more."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class IncompleteDetails(Told):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class InputTokensDetails(Told):
    cached_tokens: int = 0
    cache_write_tokens: int = Field(0, description="Always 0: what is cached costs nothing.")


class OutputTokensDetails(Told):
    reasoning_tokens: int = 0


class ResponseUsage(Told):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class Reasoning(Told):
    effort: str | None = None
    summary: None = None


class Echo(Told):
    """The fields of the request that its response repeats."""

    background: bool
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None = None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: Reasoning
    safety_identifier: str | None
    service_tier: Literal["default", "flex", "priority"]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    user: str | None


class Response(Echo):
    """The response as it is now."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None = None


class ResponseDeleted(Told):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class ItemList(Told):
    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
