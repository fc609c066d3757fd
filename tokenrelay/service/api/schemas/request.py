"""What every request body has in common: strict types, finite numbers, no unknown fields."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from tokenrelay.model.sampling_params import MAX_SEED
from tokenrelay.service.api.schemas.not_built import IN_STREAM_OPTIONS, Neutral, asks_for_nothing
from tokenrelay.service.api.schemas.sampling import SamplingFields

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKEN_IDS = 256

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class RequestSchema(BaseModel):
    """A JSON object from a client. ``not_built`` lists the parameters it may only carry with a neutral value."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    not_built: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_not_built(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        for name in cls.not_built.keys() & fields.keys():
            if not asks_for_nothing(fields[name], cls.not_built[name]):
                raise PydanticCustomError(
                    "unsupported_parameter", "is not supported by this server; leave it out", {"name": name}
                )
        return {name: value for name, value in fields.items() if name not in cls.not_built}


class StreamOptions(RequestSchema):
    not_built: ClassVar[Neutral] = IN_STREAM_OPTIONS

    include_usage: bool | None = Field(None, description="End the stream with a chunk that carries the usage.")


class GenerationRequest(SamplingFields, RequestSchema):
    """The parameters both routes share. A null is as good as a field left out."""

    model: str = Field(description="The served model's name, as in GET /v1/models.")
    max_tokens: int | None = Field(None, ge=1, description="Most tokens to generate.")
    n: int | None = Field(None, ge=1, description="Choices to generate. Default 1.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Equal seeds give equal tokens. Default: random.")
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None = Field(
        None, description="Strings that end a choice; they are not part of the text."
    )
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] | None = Field(
        None, description="Token ids that end a choice."
    )
    min_tokens: int | None = Field(None, ge=0, description="Tokens before an end may come. Default 0.")
    ignore_eos: bool | None = Field(None, description="Go on after the end-of-sequence token. Default false.")
    stream: bool | None = Field(None, description="Answer as server-sent events. Default false.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream=true.")
    user: str | None = Field(None, description="Your end user; has no effect here.")
    metadata: dict[str, str] | None = Field(None, description="Your notes; have no effect here.")

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("needs_stream", "is only allowed with stream=true", {"name": "stream_options"})
        return self
