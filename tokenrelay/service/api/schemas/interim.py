"""What chunks before the first one with text may say, to clients that asked."""

from __future__ import annotations

from pydantic import BaseModel, Field


class PromptProgress(BaseModel):
    """Names of llama.cpp. Of several prompts: the sums."""

    total: int = Field(description="Prompt tokens.")
    cache: int = Field(description="Of these, found in the prefix cache.")
    processed: int = Field(description="Of these, done so far, the cached ones included.")
    time_ms: int = Field(description="Since a worker took the request.")


class InterimFields(BaseModel):
    """Only fields that were set are sent: the first two together, as ``event: queue``."""

    position: int | None = Field(None, description="Requests that will be worked on before this one.")
    estimated_wait_seconds: float | None = Field(None, description="At the measured rate; null at a standstill.")
    prompt_progress: PromptProgress | None = None
