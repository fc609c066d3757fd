"""Log probabilities, as OpenAI's two routes and vLLM write them. Minus infinity, which JSON cannot say, is -9999."""

from __future__ import annotations

from pydantic import BaseModel


class TopLogprob(BaseModel):
    """``bytes`` is exact where ``token`` is not: a token may be a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """One entry per generated token, those without text included."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    """One entry per token. ``text_offset`` counts characters; ``top_logprobs`` holds the token itself as well."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(BaseModel):
    """``rank`` 1 is the likeliest. (vLLM)"""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]  # by token id: each prompt token's own and the likeliest
