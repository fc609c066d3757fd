"""What Ollama's clients are answered. Only fields that were set are sent; durations are in nanoseconds."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class OllamaLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class OllamaTokenLogprobs(OllamaLogprob):
    top_logprobs: list[OllamaLogprob]


class OllamaFunction(BaseModel):
    index: int
    name: str
    arguments: Any


class OllamaCall(BaseModel):
    id: str
    function: OllamaFunction


class OllamaMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    thinking: str | None = None
    tool_calls: list[OllamaCall] | None = None


class _OllamaAnswer(BaseModel):
    """A line of a stream, or all of it. What it took is told with the last line."""

    model: str
    created_at: str
    done: bool
    done_reason: Literal["stop", "length", "load"] | None = None
    total_duration: int | None = None
    load_duration: int | None = Field(None, description="Time in the queue: the model itself is loaded.")
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None
    logprobs: list[OllamaTokenLogprobs] | None = None


class OllamaChatAnswer(_OllamaAnswer):
    message: OllamaMessage


class OllamaGenerateAnswer(_OllamaAnswer):
    response: str
    thinking: str | None = None


class OllamaDetails(BaseModel):
    parent_model: str = ""
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaModel(BaseModel):
    name: str
    model: str
    modified_at: str
    size: int
    digest: str = Field(description="Differs where the model does; not a checksum of its content.")
    details: OllamaDetails


class OllamaModels(BaseModel):
    models: list[OllamaModel]


class RunningOllamaModel(BaseModel):
    name: str
    model: str
    size: int
    digest: str
    details: OllamaDetails
    expires_at: str
    size_vram: int
    context_length: int


class RunningOllamaModels(BaseModel):
    models: list[RunningOllamaModel]


class ShownModel(BaseModel):
    modelfile: str
    parameters: str
    template: str
    details: OllamaDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class OllamaVersion(BaseModel):
    version: str
