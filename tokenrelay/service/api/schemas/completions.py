"""POST /v1/completions: the request, the answer and the chunk of a stream."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, Field

from tokenrelay.model.sampling_params import MAX_LOGPROBS
from tokenrelay.service.api.schemas.interim import InterimFields
from tokenrelay.service.api.schemas.logprobs import CompletionLogprobs, PromptLogprobs
from tokenrelay.service.api.schemas.not_built import ON_COMPLETIONS, Neutral
from tokenrelay.service.api.schemas.request import GenerationRequest
from tokenrelay.service.api.schemas.usage import CompletionUsage, Timings

MAX_PROMPTS = 4096  # what is looked at; the setting max_n says how many may be asked for

TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
TokenIdLists = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]


class CompletionRequest(GenerationRequest):
    not_built: ClassVar[Neutral] = ON_COMPLETIONS

    prompt: str | Texts | TokenIds | TokenIdLists = Field(
        description="Text, token ids, or a list of either: one prompt each."
    )
    echo: bool | None = Field(None, description="The text begins with the prompt's. Default false.")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Tell how likely the tokens are, with so many alternatives."
    )
    add_special_tokens: bool | None = Field(
        None, description="Put the model's first token before a prompt that is text. Default true."
    )

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def echoes(self) -> bool:
        return bool(self.echo)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one by one, whatever the form they came in."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class CompletionChoice(BaseModel):
    """In a stream, what is told of the prompt comes with the choice's first chunk."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(InterimFields):
    """The whole answer, or a chunk of a stream: OpenAI gives both the same shape."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage | None = None
    system_fingerprint: str | None = None
    service_tier: str | None = None
    timings: Timings | None = None
