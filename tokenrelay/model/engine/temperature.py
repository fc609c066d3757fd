"""The temperature of every row: the request's own, or one that follows how unsure the model is."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from tokenrelay.model.engine.request import SamplingPosition
from tokenrelay.model.sampling_params import SamplingParams

COLDEST = 1e-5  # as good as zero, and logits divided by it stay finite


def temperatures(logits: Tensor, positions: Sequence[SamplingPosition]) -> list[float]:
    """One number per row of ``logits`` [S, vocabulary], before any temperature."""
    numbers = [max(COLDEST, at.params.temperature) for at in positions]
    dynamic = [row for row, at in enumerate(positions) if at.params.dynatemp_range > 0]
    if dynamic:
        entropies = entropy(logits[dynamic].log_softmax(dim=-1)).flatten().tolist()
        choices = logits[dynamic].isfinite().sum(dim=-1).tolist()
        for row, nats, count in zip(dynamic, entropies, choices, strict=True):
            numbers[row] = _dynamic(positions[row].params, nats / math.log(count) if count > 1 else 0.0)
    return numbers


def _dynamic(params: SamplingParams, unsureness: float) -> float:
    """Between temperature ∓ range, by the entropy in units of the largest one. (EDT, Zhang et al. 2024; llama.cpp)"""
    low, high = max(0.0, params.temperature - params.dynatemp_range), params.temperature + params.dynatemp_range
    return max(COLDEST, low + (high - low) * math.pow(max(unsureness, 0.0), params.dynatemp_exponent))


def entropy(log_probs: Tensor) -> Tensor:
    """In nats, [S, 1]. A running sum: torch's own splits a lone row among threads, and rounds differently then."""
    surprise = (log_probs.softmax(dim=-1) * log_probs).masked_fill(log_probs.isneginf(), 0.0)
    return -surprise.double().cumsum(dim=-1)[:, -1:]
