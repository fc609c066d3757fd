"""POST /v1/embeddings: the request and the answer."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, Field

from tokenrelay.model.sampling_params import Pooling
from tokenrelay.service.api.schemas.not_built import ON_EMBEDDINGS, Neutral
from tokenrelay.service.api.schemas.queued import QueuedRequest

MAX_INPUTS = 4096  # what is looked at; the setting max_inputs says how many may be asked for

Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True)]
TokenIdLists = Annotated[list[list[int]], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]


class EmbeddingRequest(QueuedRequest):
    not_built: ClassVar[Neutral] = ON_EMBEDDINGS
    stream: ClassVar[None] = None

    input: str | Texts | TokenIds | TokenIdLists = Field(
        description="Text, token ids, or a list of either: one embedding each."
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="Numbers, or their bytes: float32, little endian. Default float."
    )
    dimensions: int | None = Field(
        None, ge=1, description="Keep so many first numbers, at the length 1 again. Default: all."
    )
    pooling: Pooling | None = Field(
        None, description="The mean of all tokens' hidden states, or the last one's. Default: the server's setting."
    )
    add_special_tokens: bool | None = Field(
        None, description="Put the model's first token before an input that is text. Default true."
    )

    @property
    def inputs(self) -> list[str | list[int]]:
        """One by one, whatever the form they came in."""
        if self.has_one_input:
            return [self.input]  # type: ignore[list-item]
        return self.input  # type: ignore[return-value]

    @property
    def has_one_input(self) -> bool:
        return isinstance(self.input, str) or isinstance(self.input[0], int)


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int = Field(description="Of the input.")
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage | None = None
