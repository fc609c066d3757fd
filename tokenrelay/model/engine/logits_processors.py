"""What changes single tokens' logits before anything is drawn: a function of the request's ids and parameters.

They come in this order, and greedy rows honour them too:

1. ``logit_bias``, first as in llama.cpp and vLLM;
2. ``repetition_penalty``, then ``presence_penalty`` and ``frequency_penalty``;
3. DRY;
4. ``bad_words``, then ``allowed_token_ids``, which has the last word: no sum above can undo either.

Then follow the temperature (``temperature.py``) and the truncations (``truncation.py``). A processor gives a table
of numbers per row; the tables of all rows that use it are applied at once, token by token, so rows never mix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenrelay.model.engine.request import SamplingPosition
from tokenrelay.model.sampling_params import SamplingParams
from tokenrelay.model.transformer.transfer import tensor_on

LONGEST_REPEAT = 50  # tokens DRY looks back: its penalty grows exponentially, so a longer repeat gets no likelier
MAX_DRY_PENALTY = 1e30  # stays finite in fp32

Table = Mapping[int, float]
Rows = Sequence[tuple[int, SamplingPosition]]


class LogitsProcessor(NamedTuple):
    """``apply(logits, rows)`` changes, in place, those rows of ``logits`` [S, vocabulary]."""

    is_used: Callable[[SamplingParams], bool]
    apply: Callable[[Tensor, Rows], None]


def process(logits: Tensor, positions: Sequence[SamplingPosition]) -> None:
    """Applies, in place, every processor to the rows of ``logits`` [S, vocabulary] that use it."""
    for processor in PROCESSORS:
        rows = [(row, at) for row, at in enumerate(positions) if processor.is_used(at.params)]
        if rows:
            processor.apply(logits, rows)


def _combine(
    table: Callable[[SamplingPosition], Table],
    operation: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor,
    rows: Rows,
) -> None:
    """``operation(logits, numbers)`` over the tokens in the tables of all rows at once."""
    tables = [(row, table(at)) for row, at in rows]
    where = tensor_on(logits.device, [row for row, numbers in tables for _ in numbers], torch.long)
    ids = tensor_on(logits.device, [i for _, numbers in tables for i in numbers], torch.long)
    values = tensor_on(logits.device, [x for _, numbers in tables for x in numbers.values()], logits.dtype)
    logits[where, ids] = operation(logits[where, ids], values)


def logit_bias(at: SamplingPosition) -> Table:
    """A number to add to a token's logit: OpenAI's parameter."""
    return dict(at.params.logit_bias)


def repetition(at: SamplingPosition) -> Table:
    """Every token of the prompt or the output, once. (CTRL, Keskar et al. 2019; as transformers and vLLM have it)"""
    return dict.fromkeys(at.token_ids, at.params.repetition_penalty)


def _weaken(logits: Tensor, penalties: Tensor) -> Tensor:
    return torch.where(logits > 0, logits / penalties, logits * penalties)


def presence_and_frequency(at: SamplingPosition) -> Table:
    """What to subtract: once per token of the output, and once per occurrence. (OpenAI's two penalties)"""
    params = at.params
    counts = Counter(at.output_token_ids)
    return {i: params.presence_penalty + params.frequency_penalty * count for i, count in counts.items()}


def dry(at: SamplingPosition) -> Table:
    """DRY, "don't repeat yourself", by p-e-w (text-generation-webui #5677): a token that would prolong a repeat of
    ``L`` tokens costs multiplier · base^(L − allowed length). Repeats end at the sequence breakers."""
    params = at.params
    return {
        token_id: min(params.dry_multiplier * params.dry_base ** (length - params.dry_allowed_length), MAX_DRY_PENALTY)
        for token_id, length in _repeats(at).items()
        if length >= params.dry_allowed_length
    }


def _repeats(at: SamplingPosition) -> dict[int, int]:
    """Of each token that followed an earlier copy of the last tokens: the length of the longest such copy."""
    params = at.params
    last_n = params.dry_penalty_last_n
    ids = np.array(at.token_ids if last_n < 0 else at.token_ids[max(0, at.num_tokens - last_n) :])
    breakers = np.array(params.dry_sequence_breakers, dtype=np.int64)
    ends = np.arange(len(ids) - 1)  # of the copies
    lengths = np.zeros(len(ends), dtype=np.int64)
    for back in range(min(LONGEST_REPEAT, len(ids) - 1)):
        if ids[-1 - back] in breakers:
            break
        ends = ends[(ends >= back) & (ids[ends - back] == ids[-1 - back])]
        lengths[ends] += 1
    longest: dict[int, int] = {}
    for end in lengths.nonzero()[0]:
        token_id = int(ids[end + 1])
        longest[token_id] = max(longest.get(token_id, 0), int(lengths[end]))
    return {token_id: length for token_id, length in longest.items() if token_id not in params.dry_sequence_breakers}


def bad_words(at: SamplingPosition) -> Table:
    """The last token of every sequence whose other tokens end the output. (as in vLLM)"""
    output = at.output_token_ids
    return {
        last: torch.inf
        for *others, last in at.params.bad_words
        if len(others) <= len(output) and others == output[len(output) - len(others) :]
    }


def allow_only(logits: Tensor, rows: Rows) -> None:
    """Forbids all but ``allowed_token_ids``: vLLM's parameter. Where all of them were forbidden, they come equally
    likely: a row must be left with something."""
    for row, at in rows:
        allowed = tensor_on(logits.device, at.params.allowed_token_ids, torch.long)
        kept = logits[row, allowed]
        logits[row] = -torch.inf
        logits[row, allowed] = torch.where(kept.isfinite().any(), kept, 0.0)


PROCESSORS = (
    LogitsProcessor(lambda params: bool(params.logit_bias), partial(_combine, logit_bias, torch.add)),
    LogitsProcessor(lambda params: params.repetition_penalty != 1, partial(_combine, repetition, _weaken)),
    LogitsProcessor(
        lambda params: bool(params.presence_penalty or params.frequency_penalty),
        partial(_combine, presence_and_frequency, torch.sub),
    ),
    LogitsProcessor(lambda params: params.dry_multiplier > 0, partial(_combine, dry, torch.sub)),
    LogitsProcessor(lambda params: bool(params.bad_words), partial(_combine, bad_words, torch.sub)),
    LogitsProcessor(lambda params: bool(params.allowed_token_ids), allow_only),
)
