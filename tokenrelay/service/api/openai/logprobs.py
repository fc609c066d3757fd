"""From token ids and their log probabilities to what the two routes say about them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

from tokenrelay.model.detokenizer import IncrementalDetokenizer
from tokenrelay.model.sampling_params import TokenLogprobs
from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.service.api.schemas.logprobs import ChatLogprobs, CompletionLogprobs
from tokenrelay.service.terms import AnswerSpec

LOWEST = -9999.0  # OpenAI's and vLLM's minus infinity


class LogprobsFormat:
    """Writes them as one request asks for it."""

    def __init__(self, spec: AnswerSpec, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._num_top = spec.num_logprobs or 0
        self._num_prompt_top = spec.num_prompt_logprobs
        self._returns_token_ids = spec.return_token_ids
        self._as_token_ids = spec.return_tokens_as_token_ids

    def chat(self, tokens: Iterable[TokenLogprobs]) -> ChatLogprobs:
        content = [
            self._described(token.token_id, token.logprob)
            | {"top_logprobs": [self._described(token_id, logprob) for token_id, logprob in token.top]}
            for token in tokens
        ]
        return ChatLogprobs.model_validate({"content": content, "refusal": None})

    def completion(
        self, token_ids: Sequence[int], tokens: Sequence[TokenLogprobs | None], offsets: Sequence[int]
    ) -> CompletionLogprobs:
        """``tokens`` is None where nothing is known: for a prompt's first."""
        return CompletionLogprobs(
            tokens=[self._name(token_id) for token_id in token_ids],
            token_logprobs=[token and _finite(token.logprob) for token in tokens],
            top_logprobs=[token and self._alternatives(token) for token in tokens],
            text_offset=list(offsets),
        )

    def about_prompt(self, token_ids: Sequence[int], tokens: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """The fields ``prompt_token_ids`` and ``prompt_logprobs``, if they are asked for. (vLLM)"""
        told: dict[str, Any] = {}
        if self._returns_token_ids:
            told["prompt_token_ids"] = list(token_ids)
        if self._num_prompt_top is not None:
            told["prompt_logprobs"] = [token and self._ranked(token, self._num_prompt_top) for token in tokens]
        return told

    def _alternatives(self, token: TokenLogprobs) -> dict[str, float]:
        """By name, likeliest first. Of several with one name, the token itself counts, then the likeliest."""
        named: dict[str, float] = {}
        for token_id, logprob in token.top[: self._num_top]:
            named.setdefault(self._name(token_id), _finite(logprob))
        named[self._name(token.token_id)] = _finite(token.logprob)
        return named

    def _ranked(self, token: TokenLogprobs, num_top: int) -> dict[str, dict[str, Any]]:
        ranked = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(token.top[:num_top], 1)]
        ranked = [(token.token_id, token.logprob, token.rank), *(r for r in ranked if r[0] != token.token_id)]
        return {
            str(token_id): {
                "logprob": _finite(logprob),
                "rank": rank,
                "decoded_token": _spelled(self._tokenizer, token_id)[0],
            }
            for token_id, logprob, rank in ranked
        }

    def _described(self, token_id: int, logprob: float) -> dict[str, Any]:
        exact = _spelled(self._tokenizer, token_id)[1]
        return {"token": self._name(token_id), "logprob": _finite(logprob), "bytes": exact}

    def _name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_token_ids else _spelled(self._tokenizer, token_id)[0]


@lru_cache(maxsize=1 << 16)
def _spelled(tokenizer: Tokenizer, token_id: int) -> tuple[str, list[int]]:
    """A token's text, and its exact bytes."""
    exact = tokenizer.token_bytes(token_id)
    return exact.decode(errors="replace"), list(exact)


class TextOffsets:
    """Where the text of each token of a growing output begins: in characters, from the echoed prompt's end on.

    A token in the middle of a character begins where the character does.
    """

    def __init__(self, tokenizer: Tokenizer, spec: AnswerSpec) -> None:
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, spec.prompt_tail, skip_special_tokens=spec.skip_special_tokens
        )
        self._next = len(spec.echo or "")

    def of(self, token_ids: Iterable[int]) -> list[int]:
        """The offsets of the next tokens."""
        return [self._advance(token_id) for token_id in token_ids]

    def _advance(self, token_id: int) -> int:
        offset = self._next
        self._next += len(self._detokenizer.append([token_id]))
        return offset


def prompt_offsets(tokenizer: Tokenizer, token_ids: Sequence[int], text: str) -> list[int]:
    """The same of a prompt: counted from its text's end, since special tokens may precede what was sent."""
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    lengths = [len(detokenizer.append([token_id])) for token_id in token_ids]
    start = len(text) - sum(lengths) - len(detokenizer.flush())
    return [min(max(0, offset), len(text)) for offset in accumulate(lengths[:-1], initial=start)]


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
