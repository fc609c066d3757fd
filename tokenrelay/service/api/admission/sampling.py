"""From a body to sampling parameters: words become tokens, and ids must be the vocabulary's."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import Any

from tokenrelay.model.sampling_params import MAX_BEAMS, SamplingParams
from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.service.api.schemas.request import GenerationRequest
from tokenrelay.service.api.schemas.sampling import SamplingFields
from tokenrelay.service.errors import InvalidRequestError

DRY_BREAKERS = ("\n", ":", '"', "*")  # llama.cpp's
MIROSTAT_TAU = 5.0  # llama.cpp's

_AS_THEY_ARE = (
    *("temperature", "top_p", "top_k", "min_p", "typical_p", "xtc_probability", "xtc_threshold"),
    *("dynatemp_range", "dynatemp_exponent", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "mirostat_eta"),
    *("min_tokens", "ignore_eos", "include_stop_str_in_output", "length_penalty", "early_stopping"),
)
_BESIDE_BEAMS = {
    *("max_tokens", "n", "seed", "beam_width", "length_penalty", "early_stopping"),
    *("min_tokens", "ignore_eos", "stop_token_ids"),
}
_OFF = {"temperature": (0, 1)}  # a search for the likeliest is as good as greedy; otherwise the default is off


def sampling(body: GenerationRequest, tokenizer: Tokenizer) -> dict[str, Any]:
    """Arguments of SamplingParams, without what was left out and what each prompt has its own of.

    Raises:
        InvalidRequestError: a token id is not in the vocabulary, or there are too many beams.
    """
    require_known(body.stop_token_ids or (), tokenizer, "stop_token_ids")
    require_known(list(body.biases), tokenizer, "logit_bias")
    require_known(body.allowed_token_ids or (), tokenizer, "allowed_token_ids")
    given: dict[str, Any] = {name: getattr(body, name) for name in _AS_THEY_ARE if getattr(body, name) is not None}
    if body.repeat_penalty is not None:
        given["repetition_penalty"] = body.repeat_penalty
    return given | {
        **_choices(body),
        "stop": body.stop_strings,
        "stop_token_ids": tuple(body.stop_token_ids or ()),
        "prompt_logprobs": body.num_prompt_logprobs,
        "mirostat_tau": (body.mirostat_tau or MIROSTAT_TAU) if body.mirostat == 2 else 0.0,
        "top_n_sigma": max(0.0, body.top_n_sigma or 0.0),
        "logit_bias": tuple(body.biases.items()),
        "allowed_token_ids": tuple(sorted(set(body.allowed_token_ids or ()))),
        "bad_words": _bad_words(body.bad_words or (), tokenizer),
        "dry_sequence_breakers": _breakers(body, tokenizer) if body.dry_multiplier else (),
    }


def _choices(body: GenerationRequest) -> dict[str, Any]:
    """How many there are, and what the best are known by."""
    if body.use_beam_search:
        if body.num_generated > MAX_BEAMS:
            name = "n" if body.best_of is None else "best_of"
            raise InvalidRequestError(f"'{name}': at most {MAX_BEAMS} beams are allowed.", param=name)
        return {"n": body.n or 1, "beam_width": body.num_generated, "logprobs": body.num_logprobs}
    to_compare = 0 if body.num_generated > (body.n or 1) else None
    return {"n": body.num_generated, "logprobs": to_compare if body.num_logprobs is None else body.num_logprobs}


def require_plain_beams(body: GenerationRequest, params: SamplingParams) -> None:
    """Beams are neither sampled nor streamed, and end with a token. Raises InvalidRequestError."""
    sent_as = {"mirostat_tau": "mirostat", "grammar": body.structure.param if body.structure else "tool_choice"}
    sent = [name for name in ("stream", "echo") if getattr(body, name, None)]
    for field in fields(params):
        off = _OFF.get(field.name, (field.default,))
        if field.name not in _BESIDE_BEAMS and getattr(params, field.name) not in off:
            sent.append(sent_as.get(field.name, field.name))
    if sent and params.beam_width:
        raise InvalidRequestError(f"'{sent[0]}' does not go with use_beam_search; leave one out.", param=sent[0])


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
