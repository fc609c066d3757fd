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


class Timings(BaseModel):
    """Names of llama.cpp, and the time in the queue. By the broker's clock; a request that changed its worker is told
    from its first attempt to its end."""

    queue_ms: float = Field(description="Until a worker took the request.")
    prompt_n: int = Field(description="Tokens of the prompt.")
    prompt_ms: float = Field(description="From then to the first token.")
    prompt_per_second: float
    predicted_n: int = Field(description="Tokens generated.")
    predicted_ms: float = Field(description="From the first token to the last.")
    predicted_per_second: float
