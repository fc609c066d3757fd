"""Token counts as OpenAI reports them."""

from __future__ import annotations

from pydantic import BaseModel, Field


class PromptTokensDetails(BaseModel):
    cached_tokens: int = 0


class CompletionUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    forgotten_tokens: int = Field(
        0,
        description="With attention sinks: tokens too far back for attention to see, once a text outgrows the context.",
    )
