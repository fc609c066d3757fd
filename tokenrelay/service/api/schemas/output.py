"""What an answer holds: how many choices, found how, and what is told about their tokens. Names of OpenAI and vLLM."""

from __future__ import annotations

from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from tokenrelay.model.sampling_params import MAX_LOGPROBS


class OutputFields(BaseModel):
    """Each may be left out or null. Each route adds its own ``logprobs``."""

    n: int | None = Field(None, ge=1, description="Choices to answer with. Default 1.")
    best_of: int | None = Field(None, ge=1, description="Choices to generate: the n likeliest are kept. Default n.")
    use_beam_search: bool | None = Field(None, description="Search for the likeliest texts with best_of or n beams.")
    length_penalty: float | None = Field(
        None, ge=-10, le=10, description="Of a beam search: scores are divided by length ** length_penalty. Default 1."
    )
    early_stopping: bool | None = Field(None, description="Of a beam search: end with n whole texts. Default false.")
    include_stop_str_in_output: bool | None = Field(
        None, description="What stops a choice is part of its text. Default false."
    )
    skip_special_tokens: bool | None = Field(None, description="They are not part of the text. Default true.")
    prompt_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Tell how likely the prompt's tokens are, with so many alternatives."
    )
    return_token_ids: bool | None = Field(None, description="Answer with prompt_token_ids and token_ids, too.")
    return_tokens_as_token_ids: bool | None = Field(None, description='In logprobs, write tokens as "token_id:123".')

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to tell per generated token; None: nothing is told."""
        raise NotImplementedError

    @property
    def echoes(self) -> bool:
        """Whether the text begins with the prompt's."""
        return False

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Alternatives to compute per prompt token, for whatever part of the answer."""
        asked = (self.prompt_logprobs, self.num_logprobs if self.echoes else None)
        return max((count for count in asked if count is not None), default=None)

    @property
    def num_generated(self) -> int:
        """Choices per prompt that are generated, the best of which are kept."""
        return self.best_of or self.n or 1

    @model_validator(mode="after")
    def _best_of_at_least_n(self) -> OutputFields:
        if self.num_generated < (self.n or 1):
            raise PydanticCustomError("too_few", "must be at least n", {"name": "best_of"})
        return self

    @model_validator(mode="after")
    def _beams_only_in_a_beam_search(self) -> OutputFields:
        for name, neutral in (("length_penalty", 1), ("early_stopping", False)):
            if getattr(self, name) not in (None, neutral) and not self.use_beam_search:
                raise PydanticCustomError("no_beams", "is only allowed with use_beam_search=true", {"name": name})
        return self

    @model_validator(mode="after")
    def _names_only_with_logprobs(self) -> OutputFields:
        if self.return_tokens_as_token_ids and self.num_logprobs is None:
            raise PydanticCustomError(
                "no_logprobs", "is only allowed with logprobs", {"name": "return_tokens_as_token_ids"}
            )
        return self
