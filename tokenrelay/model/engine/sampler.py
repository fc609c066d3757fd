"""Draws the next token of every row: a function of (logits, params, seed, position, ids) and nothing else.

The random number is counter-based: a hash of (seed, position), not the state of a generator. So a request that
another worker takes over draws the numbers the first would have drawn. Rows never mix: every reduction is along
the vocabulary, so a row's token does not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from tokenrelay.model.engine.counter_random import uniform
from tokenrelay.model.engine.logits_processors import process
from tokenrelay.model.engine.request import Request
from tokenrelay.model.engine.temperature import temperatures
from tokenrelay.model.engine.truncation import is_truncated, truncate


class Sampler:
    """Samples a batch. Rows that ask for nothing special cost one argmax."""

    def __init__(self, eos_token_ids: Collection[int]) -> None:
        self._eos_token_ids = frozenset(eos_token_ids)

    def sample(self, logits: Tensor, requests: Sequence[Request]) -> list[int]:
        """One token id per row of ``logits`` [S, vocabulary], fp32. May overwrite the logits."""
        for row, request in enumerate(requests):
            self._forbid_early_end(logits[row], request)
        process(logits, requests)
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
    """Inverse of the cumulative distribution at the request's random number, after temperature and truncations."""
    logits = logits / _column(temperatures(logits, requests), logits)
    uniforms = _column([uniform(r.params.seed, r.num_tokens) for r in requests], logits).double()
    token_ids = torch.empty_like(uniforms, dtype=torch.long)
    truncated = [row for row, request in enumerate(requests) if is_truncated(request)]
    if truncated:
        descending, order = logits[truncated].sort(dim=-1, descending=True, stable=True)
        truncate(descending, [requests[row] for row in truncated])
        ranks = _inverse_cdf(descending.softmax(dim=-1), uniforms[truncated])
        token_ids[truncated] = order.gather(1, ranks)
    whole = [row for row in range(len(requests)) if row not in truncated]
    if whole:
        token_ids[whole] = _inverse_cdf((logits[whole] if truncated else logits).softmax(dim=-1), uniforms[whole])
    return [int(token_id) for token_id in token_ids.flatten()]


def _inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Index [S, 1] at which the cumulative ``weights`` [S, V] first exceed ``uniforms`` [S, 1] of their sum."""
    cumulative = weights.double().cumsum(dim=-1)
    return torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True).clamp_(max=weights.shape[1] - 1)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).unsqueeze(1)
