"""Which tokens may be drawn at all. Every truncation looks at what the ones before it left.

The order is llama.cpp's: top_n_sigma, top_k, typical_p, top_p, min_p, XTC; mirostat comes last. As in vLLM and at
OpenAI, and unlike in llama.cpp, the temperature comes first. Greedy rows are not truncated. A sum along a row is a
running sum: torch's own splits a lone row among threads, so it would round differently than among other rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokenrelay.model.engine.counter_random import XTC_STREAM, uniform
from tokenrelay.model.engine.request import SamplingPosition
from tokenrelay.model.engine.temperature import entropy
from tokenrelay.model.transformer.transfer import tensor_on

Positions = Sequence[SamplingPosition]


class Truncation(NamedTuple):
    """``keeps(logits, positions)`` says which of the descending ``logits`` [S, V] stay; −inf is gone already."""

    is_used: Callable[[SamplingPosition], bool]
    keeps: Callable[[Tensor, Positions], Tensor]


def is_truncated(position: SamplingPosition) -> bool:
    return any(truncation.is_used(position) for truncation in TRUNCATIONS)


def truncate(logits: Tensor, positions: Positions) -> None:
    """Sets to −inf, in place, what the positions' truncations drop from the descending ``logits`` [S, V]."""
    for truncation in TRUNCATIONS:
        rows = [row for row, position in enumerate(positions) if truncation.is_used(position)]
        if rows:
            index = tensor_on(logits.device, rows, torch.long)
            chosen = logits[index]
            kept = truncation.keeps(chosen, [positions[row] for row in rows])
            logits[index] = chosen.masked_fill_(~kept, -torch.inf)


def top_n_sigma(logits: Tensor, positions: Positions) -> Tensor:
    """Logits within n standard deviations of the largest, at any temperature the same. (Tang et al. 2024)"""
    finite = logits.isfinite()
    count = finite.sum(dim=-1, keepdim=True)
    values = logits.double().masked_fill(~finite, 0.0)
    mean = _total(values) / count
    sigma = (_total((values - mean).square().masked_fill(~finite, 0.0)) / count).sqrt()
    return values >= _best(logits) - _column([at.params.top_n_sigma for at in positions], logits) * sigma


def top_k(logits: Tensor, positions: Positions) -> Tensor:
    """The k largest. (Fan et al. 2018)"""
    limits = tensor_on(logits.device, [at.params.top_k for at in positions], torch.long).unsqueeze(1)
    return torch.arange(logits.shape[1], device=logits.device) < limits


def typical_p(logits: Tensor, positions: Positions) -> Tensor:
    """The tokens whose surprise is closest to the expected one, up to p of the mass. (Meister et al. 2022)"""
    log_probs = logits.log_softmax(dim=-1)
    order = (-log_probs.double() - entropy(log_probs)).abs().argsort(dim=-1, stable=True)
    probs = log_probs.softmax(dim=-1).gather(1, order)
    kept = _smallest_set(probs, _column([at.params.typical_p for at in positions], logits))
    return torch.zeros_like(kept).scatter_(1, order, kept)


def top_p(logits: Tensor, positions: Positions) -> Tensor:
    """The smallest set that holds p of the mass: nucleus sampling. (Holtzman et al. 2020)"""
    return _smallest_set(logits.softmax(dim=-1), _column([at.params.top_p for at in positions], logits))


def min_p(logits: Tensor, positions: Positions) -> Tensor:
    """Tokens at least p times as likely as the likeliest. (Nguyen et al. 2024)"""
    return logits >= _best(logits) + _column([math.log(at.params.min_p) for at in positions], logits)


def xtc(logits: Tensor, positions: Positions) -> Tensor:
    """XTC, "exclude top choices", by p-e-w (text-generation-webui #6335): of the tokens above the threshold only the
    least likely one stays. ``_xtc_happens`` tossed the coin."""
    above = logits.isfinite() & (
        logits.softmax(dim=-1) >= _column([at.params.xtc_threshold for at in positions], logits)
    )
    return ~above | (above.cumsum(dim=-1) == above.sum(dim=-1, keepdim=True))


def _xtc_happens(position: SamplingPosition) -> bool:
    chance = position.params.xtc_probability
    return chance > 0 and uniform(position.params.seed ^ XTC_STREAM, position.num_tokens) < chance


def mirostat(logits: Tensor, positions: Positions) -> Tensor:
    """Mirostat 2: tokens that surprise less than mu, in bits, and the likeliest anyway. (Basu et al. 2021)"""
    surprise = -logits.log_softmax(dim=-1) / math.log(2)
    kept = surprise <= _column([at.request.mirostat_mu for at in positions], logits)
    kept[:, 0] = True
    return kept


def next_mirostat_mu(position: SamplingPosition, probability: float) -> float:
    """The state after a token that had this probability among those kept: it steers towards tau bits a token."""
    surprise = -math.log2(max(probability, 1e-30))
    return position.request.mirostat_mu - position.params.mirostat_eta * (surprise - position.params.mirostat_tau)


def _smallest_set(probs: Tensor, mass: Tensor) -> Tensor:
    """As many of the first ``probs`` [S, V] as hold ``mass`` [S, 1] of their sum."""
    cumulative = probs.double().cumsum(dim=-1)
    return cumulative - probs < mass * cumulative[:, -1:]


def _best(logits: Tensor) -> Tensor:
    return logits.double().amax(dim=-1, keepdim=True)


def _total(values: Tensor) -> Tensor:
    return values.cumsum(dim=-1)[:, -1:]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return tensor_on(like.device, values, torch.float64).unsqueeze(1)


TRUNCATIONS = (
    Truncation(lambda at: at.params.top_n_sigma > 0, top_n_sigma),
    Truncation(lambda at: at.params.top_k > 0, top_k),
    Truncation(lambda at: at.params.typical_p < 1, typical_p),
    Truncation(lambda at: at.params.top_p < 1, top_p),
    Truncation(lambda at: at.params.min_p > 0, min_p),
    Truncation(_xtc_happens, xtc),
    Truncation(lambda at: at.params.mirostat_tau > 0, mirostat),
)
