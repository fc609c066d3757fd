"""Which tokens may be drawn at all. Every truncation looks at what the ones before it left.

The order is llama.cpp's: top_n_sigma, top_k, typical_p, top_p, min_p, XTC. As in vLLM and at OpenAI, and unlike in
llama.cpp, the temperature comes first. Greedy rows are not truncated. A sum along a row is a running sum: torch's
own splits a lone row among threads, so it would round differently than among other rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokenrelay.model.engine.counter_random import XTC_STREAM, uniform
from tokenrelay.model.engine.request import Request
from tokenrelay.model.engine.temperature import entropy
from tokenrelay.model.sampling_params import SamplingParams


class Truncation(NamedTuple):
    """``keeps(logits, params)`` says which of the descending ``logits`` [S, V] stay; −inf is gone already."""

    is_used: Callable[[Request], bool]
    keeps: Callable[[Tensor, Sequence[SamplingParams]], Tensor]


def is_truncated(request: Request) -> bool:
    return any(truncation.is_used(request) for truncation in TRUNCATIONS)


def truncate(logits: Tensor, requests: Sequence[Request]) -> None:
    """Sets to −inf, in place, what the requests' truncations drop from the descending ``logits`` [S, V]."""
    for truncation in TRUNCATIONS:
        rows = [row for row, request in enumerate(requests) if truncation.is_used(request)]
        if rows:
            chosen = logits[rows]
            kept = truncation.keeps(chosen, [requests[row].params for row in rows])
            logits[rows] = chosen.masked_fill_(~kept, -torch.inf)


def top_n_sigma(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Logits within n standard deviations of the largest, at any temperature the same. (Tang et al. 2024)"""
    finite = logits.isfinite()
    count = finite.sum(dim=-1, keepdim=True)
    values = logits.double().masked_fill(~finite, 0.0)
    mean = _total(values) / count
    sigma = (_total((values - mean).square().masked_fill(~finite, 0.0)) / count).sqrt()
    return values >= _best(logits) - _column([p.top_n_sigma for p in params], logits) * sigma


def top_k(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The k largest. (Fan et al. 2018)"""
    limits = torch.tensor([[p.top_k] for p in params], device=logits.device)
    return torch.arange(logits.shape[1], device=logits.device) < limits


def typical_p(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The tokens whose surprise is closest to the expected one, up to p of the mass. (Meister et al. 2022)"""
    log_probs = logits.log_softmax(dim=-1)
    order = (-log_probs.double() - entropy(log_probs)).abs().argsort(dim=-1, stable=True)
    probs = log_probs.softmax(dim=-1).gather(1, order)
    kept = _smallest_set(probs, _column([p.typical_p for p in params], logits))
    return torch.zeros_like(kept).scatter_(1, order, kept)


def top_p(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The smallest set that holds p of the mass: nucleus sampling. (Holtzman et al. 2020)"""
    return _smallest_set(logits.softmax(dim=-1), _column([p.top_p for p in params], logits))


def min_p(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Tokens at least p times as likely as the likeliest. (Nguyen et al. 2024)"""
    return logits >= _best(logits) + _column([math.log(p.min_p) for p in params], logits)


def xtc(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """XTC, "exclude top choices", by p-e-w (text-generation-webui #6335): of the tokens above the threshold only the
    least likely one stays. ``_xtc_happens`` tossed the coin."""
    above = logits.isfinite() & (logits.softmax(dim=-1) >= _column([p.xtc_threshold for p in params], logits))
    return ~above | (above.cumsum(dim=-1) == above.sum(dim=-1, keepdim=True))


def _xtc_happens(request: Request) -> bool:
    chance = request.params.xtc_probability
    return chance > 0 and uniform(request.params.seed ^ XTC_STREAM, request.num_tokens) < chance


def _smallest_set(probs: Tensor, mass: Tensor) -> Tensor:
    """As many of the first ``probs`` [S, V] as hold ``mass`` [S, 1] of their sum."""
    cumulative = probs.double().cumsum(dim=-1)
    return cumulative - probs < mass * cumulative[:, -1:]


def _best(logits: Tensor) -> Tensor:
    return logits.double().amax(dim=-1, keepdim=True)


def _total(values: Tensor) -> Tensor:
    return values.cumsum(dim=-1)[:, -1:]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device).unsqueeze(1)


TRUNCATIONS = (
    Truncation(lambda request: request.params.top_n_sigma > 0, top_n_sigma),
    Truncation(lambda request: request.params.top_k > 0, top_k),
    Truncation(lambda request: request.params.typical_p < 1, typical_p),
    Truncation(lambda request: request.params.top_p < 1, top_p),
    Truncation(lambda request: request.params.min_p > 0, min_p),
    Truncation(_xtc_happens, xtc),
)
