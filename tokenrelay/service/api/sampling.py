"""From a body's sampling fields to sampling parameters: words become tokens, and ids must be the vocabulary's."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.service.api.schemas.sampling import SamplingFields
from tokenrelay.service.errors import InvalidRequestError

DRY_BREAKERS = ("\n", ":", '"', "*")  # llama.cpp's

_AS_THEY_ARE = (
    *("temperature", "top_p", "top_k", "min_p", "typical_p", "xtc_probability", "xtc_threshold"),
    *("dynatemp_range", "dynatemp_exponent", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n"),
)


def sampling(body: SamplingFields, tokenizer: Tokenizer) -> dict[str, Any]:
    """Arguments of SamplingParams, without what was left out. Raises InvalidRequestError."""
    require_known(list(body.biases), tokenizer, "logit_bias")
    require_known(body.allowed_token_ids or (), tokenizer, "allowed_token_ids")
    given: dict[str, Any] = {name: getattr(body, name) for name in _AS_THEY_ARE if getattr(body, name) is not None}
    if body.repeat_penalty is not None:
        given["repetition_penalty"] = body.repeat_penalty
    return given | {
        "top_n_sigma": max(0.0, body.top_n_sigma or 0.0),
        "logit_bias": tuple(body.biases.items()),
        "allowed_token_ids": tuple(sorted(set(body.allowed_token_ids or ()))),
        "bad_words": _bad_words(body.bad_words or (), tokenizer),
        "dry_sequence_breakers": _breakers(body, tokenizer) if body.dry_multiplier else (),
    }


def text_size(body: SamplingFields) -> int:
    """Characters that ``sampling`` will tokenize."""
    return sum(len(word) + 1 for word in body.bad_words or ()) * 2


def _bad_words(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each as a text begins with it, and as it follows a space. (as vLLM does)"""
    spelled = [space + word.lstrip() for word in words for space in ("", " ")]
    sequences = [tuple(tokenizer.encode(word, add_special_tokens=False)) for word in spelled]
    return tuple(dict.fromkeys(sequence for sequence in sequences if sequence))


def _breakers(body: SamplingFields, tokenizer: Tokenizer) -> tuple[int, ...]:
    """A string stands for its last token, as it comes after a letter. (as in DRY's first implementation)"""
    given = DRY_BREAKERS if body.dry_sequence_breakers is None else body.dry_sequence_breakers
    ids = [b if isinstance(b, int) else tokenizer.encode(f"a{b}", add_special_tokens=False)[-1] for b in given]
    require_known(ids, tokenizer, "dry_sequence_breakers")
    return tuple(dict.fromkeys(ids))


def require_known(token_ids: Collection[int], tokenizer: Tokenizer, param: str) -> None:
    """Raises InvalidRequestError when one of them is not in the vocabulary."""
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < tokenizer.vocab_size:
        raise InvalidRequestError(f"'{param}': token ids go from 0 to {tokenizer.vocab_size - 1}.", param=param)
