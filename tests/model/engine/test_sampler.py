"""Sampling is a function of (logits, params, seed, position), with the distribution it promises."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch

from tests.model.engine.drawing import draw
from tokenrelay.model.engine.counter_random import uniform
from tokenrelay.model.engine.request import Request
from tokenrelay.model.sampling_params import SamplingParams

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 1.0, -3.0, 0.2])
DRAWS = 10_000
CRITICAL = 24.3  # chi-square, 7 degrees of freedom, p = 0.001


def request(**params: Any) -> Request:
    return Request("r", [1], SamplingParams(max_tokens=9, **params))


def counts(**params: Any) -> Counter[int]:
    requests = [request(seed=seed, **params) for seed in range(DRAWS)]
    return Counter(draw(LOGITS.repeat(DRAWS, 1), requests))


def chi_square(observed: Counter[int], probs: torch.Tensor) -> float:
    assert all(probs[token] > 0 for token in observed)
    return math.fsum(
        (observed[t] - DRAWS * p) ** 2 / (DRAWS * p) for t, p in enumerate(probs.tolist()) if DRAWS * p > 5
    )


def test_temperature() -> None:
    for temperature in (0.5, 1.0, 1.7):
        assert chi_square(counts(temperature=temperature), (LOGITS / temperature).softmax(0)) < CRITICAL


def test_top_k_keeps_the_k_best() -> None:
    probs = torch.where(LOGITS >= 1.0, LOGITS, -torch.inf).softmax(0)
    assert chi_square(counts(top_k=3), probs) < CRITICAL


def test_top_p_keeps_the_smallest_set_with_that_mass() -> None:
    probs = LOGITS.softmax(0)
    kept = torch.tensor([0, 1, 5, 2])  # 0.43 + 0.16 + 0.16 + 0.10 ≥ 0.8 > 0.75
    expected = torch.zeros(8)
    expected[kept] = probs[kept] / probs[kept].sum()
    assert chi_square(counts(top_p=0.8), expected) < CRITICAL


def test_temperature_zero_is_the_best_token() -> None:
    assert counts(temperature=0) == {0: DRAWS}


def test_a_row_s_token_does_not_depend_on_the_other_rows() -> None:
    torch.manual_seed(0)
    logits = torch.randn(40, 3000)
    requests = [
        request(seed=i, temperature=i % 3 * 0.7, top_k=(0, 50)[i % 2], top_p=(1.0, 0.9)[i % 5 > 2]) for i in range(40)
    ]
    together = draw(logits.clone(), requests)
    alone = [draw(row.unsqueeze(0).clone(), [r]) for row, r in zip(logits, requests, strict=True)]
    assert [[token] for token in together] == alone


def test_the_end_is_forbidden_before_min_tokens() -> None:
    for params in ({"temperature": 0.0}, {"temperature": 1.0}):
        short = request(min_tokens=2, stop_token_ids=(1,), **params)
        assert draw(LOGITS.unsqueeze(0).clone(), [short], [0])[0] not in (0, 1)


def test_random_numbers_are_uniform_and_depend_on_both_words() -> None:
    numbers = [uniform(seed, position) for seed in range(100) for position in range(100)]
    assert len(set(numbers)) == 10_000
    buckets = Counter(int(number * 16) for number in numbers)
    assert sum((count - 625) ** 2 / 625 for count in buckets.values()) < 37.7  # 15 degrees of freedom, p = 0.001
