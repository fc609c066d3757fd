"""How the next token is chosen, under the names that OpenAI's, vLLM's and llama.cpp's users send."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from tokenrelay.model.sampling_params import MAX_COUNT

MAX_BIASED_TOKENS = 1024
MAX_ALLOWED_TOKENS = 2**20  # what is looked at; the vocabulary is the limit
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARACTERS = 256
MAX_BREAKERS = 64
MAX_BREAKER_CHARACTERS = 64


def _not_too_many(biases: Any) -> Any:
    """Before each of them is looked at."""
    if isinstance(biases, dict) and len(biases) > MAX_BIASED_TOKENS:
        raise PydanticCustomError("too_many", "at most {limit} tokens are allowed", {"limit": MAX_BIASED_TOKENS})
    return biases


_ONLY_SO_MANY_KEYS = Field(json_schema_extra={"additionalProperties": False, "maxProperties": MAX_BIASED_TOKENS})
TokenIdKey = Annotated[str, Field(pattern=r"^(0|[1-9]\d{0,8})$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARACTERS)]
Breaker = Annotated[str, Field(min_length=1, max_length=MAX_BREAKER_CHARACTERS)] | int


Temperature = Annotated[float, Field(ge=0, le=100)]
TopK = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Probability = Annotated[float, Field(ge=0, le=1)]
PositiveProbability = Annotated[float, Field(gt=0, le=1)]
RepetitionPenalty = Annotated[float, Field(ge=0.01, le=100)]
AdditivePenalty = Annotated[float, Field(ge=-2, le=2)]
Mirostat = Annotated[int, Field(ge=0, le=2, multiple_of=2)]  # a Literal would take false for 0
MirostatTau = Annotated[float, Field(gt=0, le=100)]


class SamplingFields(BaseModel):
    """Each may be left out or null; then it changes nothing."""

    temperature: Temperature | None = Field(None, description="0 is greedy. Default 1.")
    top_p: PositiveProbability | None = Field(None, description="Default 1: off.")
    top_k: TopK | None = Field(None, description="Default 0: off.")
    min_p: Probability | None = Field(None, description="Default 0: off.")
    typical_p: PositiveProbability | None = Field(None, description="Default 1: off.")
    top_n_sigma: float | None = Field(None, ge=-1, le=100, description="Default 0: off, as are negative numbers.")
    xtc_probability: Probability | None = Field(None, description="Default 0: off.")
    xtc_threshold: Probability | None = Field(None, description="Default 0.1.")
    dynatemp_range: float | None = Field(None, ge=0, le=100, description="Default 0: off.")
    dynatemp_exponent: float | None = Field(None, gt=0, le=100, description="Default 1.")
    mirostat: Mirostat | None = Field(None, description="2: Mirostat 2.0, instead of truncations. Default 0: off.")
    mirostat_tau: MirostatTau | None = Field(None, description="Surprise to aim at, in bits. Default 5.")
    mirostat_eta: Probability | None = Field(None, description="How fast the aim is corrected. Default 0.1.")
    repetition_penalty: RepetitionPenalty | None = Field(None, description="Over all tokens. Default 1: off.")
    repeat_penalty: RepetitionPenalty | None = Field(None, description="llama.cpp's name of repetition_penalty.")
    presence_penalty: AdditivePenalty | None = Field(None, description="Over the output. Default 0: off.")
    frequency_penalty: AdditivePenalty | None = Field(None, description="Over the output. Default 0: off.")
    dry_multiplier: float | None = Field(None, ge=0, le=100, description="Default 0: off.")
    dry_base: float | None = Field(None, ge=1, le=100, description="Default 1.75.")
    dry_allowed_length: int | None = Field(None, ge=0, le=MAX_COUNT, description="Default 2.")
    dry_penalty_last_n: int | None = Field(None, ge=-1, le=MAX_COUNT, description="Default -1: all tokens.")
    dry_sequence_breakers: Annotated[list[Breaker], Field(max_length=MAX_BREAKERS, fail_fast=True)] | None = Field(
        None, description='Strings or token ids at which repeats end. Default "\\n", ":", "\\"" and "*".'
    )
    logit_bias: Annotated[dict[TokenIdKey, Bias], BeforeValidator(_not_too_many), _ONLY_SO_MANY_KEYS] | None = Field(
        None, description="From token id to what is added to its logit."
    )
    bad_words: Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS, fail_fast=True)] | None = Field(
        None, description="Words that must not come."
    )
    allowed_token_ids: (
        Annotated[list[int], Field(min_length=1, max_length=MAX_ALLOWED_TOKENS, fail_fast=True)] | None
    ) = Field(None, description="The only tokens that may come.")

    @model_validator(mode="after")
    def _one_repetition_penalty(self) -> SamplingFields:
        both = (self.repetition_penalty, self.repeat_penalty)
        if None not in both and both[0] != both[1]:
            raise PydanticCustomError(
                "two_penalties", "contradicts repetition_penalty; send one of them", {"name": "repeat_penalty"}
            )
        return self

    @property
    def biases(self) -> dict[int, float]:
        return {int(token_id): bias for token_id, bias in (self.logit_bias or {}).items()}
