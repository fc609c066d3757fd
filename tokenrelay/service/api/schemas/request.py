"""The parameters that both generation routes share."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from tokenrelay.model.sampling_params import MAX_SEED
from tokenrelay.service.api.schemas.not_built import IN_STREAM_OPTIONS, Neutral
from tokenrelay.service.api.schemas.output import OutputFields
from tokenrelay.service.api.schemas.request_schema import RequestSchema
from tokenrelay.service.api.schemas.sampling import SamplingFields
from tokenrelay.service.api.schemas.structured import StructuredFields

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_PRIORITY = 100  # either way: what the queue's order has room for
MAX_SALT_CHARACTERS = 256
MAX_TIMEOUT_SECONDS = 24 * 3600  # what the broker keeps of a live request

_TIERS = {"flex": 10, "priority": -10}

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class StreamOptions(RequestSchema):
    not_built: ClassVar[Neutral] = IN_STREAM_OPTIONS

    include_usage: bool | None = Field(None, description="End the stream with a chunk that carries the usage.")
    include_queue: bool | None = Field(
        None, description="Tell the place in the queue while the request waits: `event: queue`, at most twice a second."
    )
    continuous_usage_stats: bool | None = Field(
        None, description="Tell the usage so far with every chunk. Only with include_usage."
    )

    @model_validator(mode="after")
    def _usage_is_told(self) -> StreamOptions:
        if self.continuous_usage_stats and not self.include_usage:
            raise PydanticCustomError(
                "no_usage", "is only allowed with include_usage=true", {"name": "continuous_usage_stats"}
            )
        return self


class GenerationRequest(SamplingFields, OutputFields, StructuredFields, RequestSchema):
    """The parameters both routes share. A null is as good as a field left out."""

    model: str = Field(description="The served model's name, as in GET /v1/models.")
    max_tokens: int | None = Field(
        None, ge=0, description="Most tokens to generate. 0 scores the prompt: only with echo or prompt_logprobs."
    )
    n_predict: Annotated[int, Field(ge=1)] | Literal[-1] | None = Field(
        None, description="llama.cpp's name of max_tokens; -1: no limit."
    )
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Equal seeds give equal tokens. Default: random.")
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None = Field(
        None, description="Strings that end a choice; they are not part of the text."
    )
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] | None = Field(
        None, description="Token ids that end a choice."
    )
    min_tokens: int | None = Field(None, ge=0, description="Tokens before an end may come. Default 0.")
    ignore_eos: bool | None = Field(None, description="Go on after the end-of-sequence token. Default false.")
    truncate_prompt_tokens: int | None = Field(None, ge=1, description="Use only so many last tokens of the prompt.")
    priority: int | None = Field(
        None, ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="Lower is served sooner. Default 0."
    )
    cache_salt: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_SALT_CHARACTERS,
        description="Cached prefixes are shared only with requests of the same salt.",
    )
    cache_prompt: bool | None = Field(None, description="Whether the prompt may be found in the cache. Default true.")
    service_tier: Literal["auto", "default", "flex", "priority"] | None = Field(
        None, description="flex: after the others; priority: before them. `priority` says it more finely."
    )
    timeout: float | None = Field(
        None,
        gt=0,
        le=MAX_TIMEOUT_SECONDS,
        description="Seconds until the request must be done, its time in the queue included.",
    )
    on_disconnect: Literal["cancel", "continue"] | None = Field(
        None, description="What your leaving means. A request that continues can be read later. Default cancel."
    )
    stream: bool | None = Field(None, description="Answer as server-sent events. Default false.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream=true.")
    return_progress: bool | None = Field(
        None, description="Tell how far the prompt is: chunks with `prompt_progress`. Only with stream=true."
    )
    timings_per_token: bool | None = Field(
        None, description="Tell how long it took: `timings`, in the answer or in the stream's last chunk."
    )
    prompt_cache_key: str | None = Field(None, description="Has no effect here: equal prompts always share the cache.")
    safety_identifier: str | None = Field(None, description="Your end user; has no effect here.")
    user: str | None = Field(None, description="Your end user; has no effect here.")
    metadata: dict[str, str] | None = Field(None, description="Your notes; have no effect here.")

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.n_predict in (None, -1) else self.n_predict

    @property
    def rank(self) -> int:
        """The priority, as a number or by its tier."""
        return (self.priority or 0) + _TIERS.get(self.service_tier or "", 0)

    @property
    def granted_tier(self) -> str:
        """As OpenAI tells it: what ``auto`` became."""
        return "default" if self.service_tier == "auto" else self.service_tier or ""

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    @property
    def include_queue(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_queue)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @model_validator(mode="after")
    def _stream_fits(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("needs_stream", "is only allowed with stream=true", {"name": "stream_options"})
        if self.return_progress and not self.stream:
            raise PydanticCustomError("needs_stream", "is only allowed with stream=true", {"name": "return_progress"})
        if self.stream and self.num_generated > (self.n or 1):
            raise PydanticCustomError("no_stream", "above n is not allowed with stream=true", {"name": "best_of"})
        return self

    @model_validator(mode="after")
    def _one_length(self) -> GenerationRequest:
        if self.n_predict is not None and self.max_tokens is not None and self.n_predict != self.max_tokens:
            raise PydanticCustomError("two_limits", "contradicts max_tokens; send one of them", {"name": "n_predict"})
        if self.service_tier in _TIERS and self.priority:
            raise PydanticCustomError(
                "two_priorities", "contradicts priority; send one of them", {"name": "service_tier"}
            )
        return self

    @model_validator(mode="after")
    def _nothing_to_generate(self) -> GenerationRequest:
        if self.max_tokens == 0 and not self.echoes and self.prompt_logprobs is None:
            raise PydanticCustomError(
                "nothing_asked", "0 is only allowed with echo or prompt_logprobs", {"name": "max_tokens"}
            )
        if self.max_tokens == 0 and self.min_tokens:
            raise PydanticCustomError("min_above_max", "must be between 0 and max_tokens", {"name": "min_tokens"})
        return self
