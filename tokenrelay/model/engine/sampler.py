"""Draws the next token of every row: a function of (logits, params, seed, position) and nothing else.

The random number is counter-based: a hash of (seed, position), not the state of a generator. So a request that
another worker takes over draws the numbers the first would have drawn. Rows never mix: every reduction is along
the vocabulary, so a row's token does not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from tokenrelay.model.engine.request import Request

_MASK = 2**64 - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from 53 bits of SplitMix64's output function applied to both words. (Steele et al. 2014)"""
    return (_mix(_mix(seed) ^ position * 0x9E3779B97F4A7C15) >> 11) / 2**53


def _mix(word: int) -> int:
    word = (word + 0x9E3779B97F4A7C15) & _MASK
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _MASK
    return word ^ word >> 31


class Sampler:
    """Samples a batch. Rows that ask for nothing special cost one argmax."""

    def __init__(self, eos_token_ids: Collection[int]) -> None:
        self._eos_token_ids = frozenset(eos_token_ids)

    def sample(self, logits: Tensor, requests: Sequence[Request]) -> list[int]:
        """One token id per row of ``logits`` [S, vocabulary], fp32. May overwrite the logits."""
        for row, request in enumerate(requests):
            self._forbid_early_end(logits[row], request)
        token_ids: list[int] = logits.argmax(dim=-1).tolist()
        random_rows = [row for row, request in enumerate(requests) if not request.params.greedy]
        if random_rows:
            drawn = _draw(logits[random_rows], [requests[row] for row in random_rows])
            for row, token_id in zip(random_rows, drawn, strict=True):
                token_ids[row] = token_id
        return token_ids

    def _forbid_early_end(self, logits: Tensor, request: Request) -> None:
        params = request.params
        if request.num_output_tokens < params.min_tokens:
            logits[list(self._eos_token_ids.union(params.stop_token_ids))] = -torch.inf


def _draw(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    """Inverse of the cumulative distribution at the request's random number, after temperature, top-k and top-p."""
    params = [request.params for request in requests]
    logits = logits / _column([p.temperature for p in params], logits)
    uniforms = _column([uniform(r.params.seed, r.num_tokens) for r in requests], logits).double()
    filtered = [row for row, p in enumerate(params) if p.top_k or p.top_p < 1]
    token_ids = _inverse_cdf(logits.softmax(dim=-1), uniforms)
    if filtered:
        probs, order = logits[filtered].softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        keep = _top_k_top_p(probs, [params[row].top_k for row in filtered], [params[row].top_p for row in filtered])
        ranks = _inverse_cdf(probs * keep, uniforms[filtered])
        token_ids[filtered] = order.gather(1, ranks)
    return [int(token_id) for token_id in token_ids.flatten()]


def _top_k_top_p(probs: Tensor, top_ks: Sequence[int], top_ps: Sequence[float]) -> Tensor:
    """Which of the descending ``probs`` [S, V] stay: the k largest, and of these the smallest set that holds p of
    their mass (nucleus sampling, Holtzman et al. 2020)."""
    ranks = torch.arange(probs.shape[1], device=probs.device)
    limits = torch.tensor([k or probs.shape[1] for k in top_ks], device=probs.device).unsqueeze(1)
    kept = torch.where(ranks < limits, probs, 0.0).double()
    before = kept.cumsum(dim=-1) - kept
    return (ranks < limits) & (before < _column(top_ps, probs).double() * kept.sum(dim=-1, keepdim=True))


def _inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Index [S, 1] at which the cumulative ``weights`` [S, V] first exceed ``uniforms`` [S, 1] of their sum."""
    cumulative = weights.double().cumsum(dim=-1)
    return torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True).clamp_(max=weights.shape[1] - 1)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).unsqueeze(1)
