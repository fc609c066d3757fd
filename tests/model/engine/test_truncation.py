"""What each truncation keeps, and that what is drawn then has the distribution promised."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.engine.drawing import draw
from tests.model.engine.test_sampler import CRITICAL, LOGITS, chi_square, counts
from tokenrelay.model.engine import sampler
from tokenrelay.model.engine.counter_random import XTC_STREAM, uniform
from tokenrelay.model.engine.request import Request, SamplingPosition
from tokenrelay.model.engine.sampler import Sampler
from tokenrelay.model.engine.step import ScheduledRequest
from tokenrelay.model.engine.temperature import temperatures
from tokenrelay.model.engine.truncation import truncate
from tokenrelay.model.sampling_params import SamplingParams

PROBS = LOGITS.double().softmax(0)


def request(**params: Any) -> Request:
    return Request("r", [1], SamplingParams(max_tokens=9, **params))


def kept(logits: Tensor, **params: Any) -> set[int]:
    descending, order = logits.unsqueeze(0).sort(dim=-1, descending=True, stable=True)
    truncate(descending, [SamplingPosition(request(**params))])
    return {int(token) for token in order[descending.isfinite()]}


def plain_min_p(logits: list[float], p: float) -> set[int]:
    return {i for i, x in enumerate(logits) if math.exp(x - max(logits)) >= p}


def plain_top_n_sigma(logits: list[float], n: float) -> set[int]:
    mean = math.fsum(logits) / len(logits)
    sigma = math.sqrt(math.fsum((x - mean) ** 2 for x in logits) / len(logits))
    return {i for i, x in enumerate(logits) if x >= max(logits) - n * sigma}


def plain_typical_p(logits: list[float], p: float) -> set[int]:
    total = math.fsum(map(math.exp, logits))
    surprise = [math.log(total) - x for x in logits]
    expected = math.fsum(math.exp(-s) * s for s in surprise)
    mass, result = 0.0, set()
    for i in sorted(range(len(logits)), key=lambda i: abs(surprise[i] - expected)):
        if mass < p:
            result.add(i)
        mass += math.exp(-surprise[i])
    return result


@pytest.mark.parametrize(
    ("name", "values", "plain"),
    [
        ("min_p", (0.01, 0.1, 0.4, 1.0), plain_min_p),
        ("top_n_sigma", (0.3, 1.0, 2.0), plain_top_n_sigma),
        ("typical_p", (0.2, 0.5, 0.9), plain_typical_p),
    ],
)
def test_what_is_kept_is_what_plain_python_keeps(name: str, values: tuple[float, ...], plain: Any) -> None:
    rng = random.Random(5)
    for _ in range(100):
        logits = torch.tensor([rng.gauss(0, 2) for _ in range(30)])
        for value in values:
            assert kept(logits, **{name: value}) == plain(logits.tolist(), value)


def test_top_n_sigma_keeps_the_same_at_any_temperature() -> None:
    torch.manual_seed(6)
    logits = torch.randn(1000)
    assert kept(logits, top_n_sigma=2.0) == kept(logits / 4, top_n_sigma=2.0)


def test_tokens_that_are_gone_already_do_not_count() -> None:
    for params in ({"top_n_sigma": 1.0}, {"typical_p": 0.6}, {"min_p": 0.2}, {"xtc_probability": 1.0}):
        padded = torch.cat([LOGITS, torch.full((50,), -torch.inf)])
        assert kept(padded, **params) == kept(LOGITS, **params)
    assert kept(torch.tensor([1.0, 0.0, -torch.inf]), xtc_probability=1.0, xtc_threshold=0.0) == {1}


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"min_p": 0.3}, {0, 1, 5}),  # e^(1 − 2) = 0.37, e^(0.5 − 2) = 0.22
        ({"top_n_sigma": 1.0}, {0, 1, 5}),  # σ = 1.41
        ({"typical_p": 0.3}, {1, 5}),  # the likeliest token is not typical
        ({"top_k": 5, "typical_p": 0.9, "top_p": 0.9, "min_p": 0.2}, {0, 1, 5, 2}),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.12}, {2, 3, 4, 5, 6, 7}),  # of 0, 1, 5 the last stays
    ],
)
def test_draws_follow_the_distribution_of_what_is_kept(params: dict[str, Any], expected: set[int]) -> None:
    assert kept(LOGITS, **params) == expected
    probs = torch.zeros(8, dtype=torch.float64)
    probs[list(expected)] = PROBS[list(expected)]
    assert chi_square(counts(**params), probs / probs.sum()) < CRITICAL


def test_xtc_happens_as_often_as_asked_and_independently_of_the_draw() -> None:
    without = PROBS.clone()
    without[[0, 1]] = 0
    mixture = 0.4 * without / without.sum() + 0.6 * PROBS
    assert chi_square(counts(xtc_probability=0.4, xtc_threshold=0.12), mixture) < CRITICAL


def test_the_coin_and_the_draw_are_different_random_numbers() -> None:
    pairs = Counter(
        (int(uniform(s, p) * 4), int(uniform(s ^ XTC_STREAM, p) * 4)) for s in range(100) for p in range(100)
    )
    assert sum((pairs[i, j] - 625) ** 2 / 625 for i in range(4) for j in range(4)) < 37.7  # 15 degrees, p = 0.001


def test_dynamic_temperature_follows_the_entropy() -> None:
    one = request(temperature=1.0, dynatemp_range=0.5, dynatemp_exponent=2.0)
    entropy = -math.fsum(p * math.log(p) for p in PROBS.tolist())
    expected = 0.5 + 1.0 * (entropy / math.log(8)) ** 2
    assert temperatures(LOGITS.unsqueeze(0), [SamplingPosition(one)]) == [pytest.approx(expected, rel=1e-6)]
    flat_and_sure = torch.tensor([[0.0] * 8, [90.0] + [0.0] * 7])
    assert temperatures(flat_and_sure, [SamplingPosition(one)] * 2) == [pytest.approx(1.5), pytest.approx(0.5)]
    drawn = counts(temperature=1.0, dynatemp_range=0.5, dynatemp_exponent=2.0)
    assert chi_square(drawn, (LOGITS / expected).softmax(0)) < CRITICAL


def test_a_dynamic_temperature_of_zero_and_a_lone_choice_draw_the_best() -> None:
    sure = torch.tensor([[0.0, 200.0, 0.0]])
    assert draw(sure, [request(temperature=0.5, dynatemp_range=1.0)]) == [1]
    lone = torch.tensor([[-torch.inf, -torch.inf, 1.0]])
    assert draw(lone, [request(temperature=0.5, dynatemp_range=0.2, typical_p=0.5)]) == [2]


def test_tiny_temperatures_draw_the_best() -> None:
    assert draw(LOGITS.unsqueeze(0).clone(), [request(temperature=1e-300)]) == [0]


def test_a_batch_without_truncations_is_not_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(sampler, "truncate", lambda logits, requests: calls.append(len(requests)))
    draw(LOGITS.repeat(3, 1), [request(), request(temperature=0, top_k=1), request(xtc_threshold=0.2)])
    assert calls == []
    draw(LOGITS.repeat(2, 1), [request(), request(top_k=1)])
    assert calls == [1]


def test_mirostat_draws_among_tokens_that_surprise_less_than_mu() -> None:
    surprise = -PROBS.log2()
    kept = torch.where(surprise <= 3.0, LOGITS, -torch.inf).softmax(0)
    assert 2 < int((kept > 0).sum()) < 8
    assert chi_square(counts(temperature=1.0, mirostat_tau=1.5), kept) < CRITICAL  # it begins with mu = 2 tau


def test_mirostat_steers_the_mean_surprise_to_tau() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1000) * 2
    one = Request("r", [1], SamplingParams(max_tokens=9999, temperature=1.0, mirostat_tau=4.0, seed=3))
    surprises = []
    for _ in range(2000):
        sampled = Sampler([]).sample(logits.clone().unsqueeze(0), [ScheduledRequest(one, 1)])[0]
        assert sampled.mirostat_mu is not None
        surprises.append(4.0 - (sampled.mirostat_mu - one.mirostat_mu) / 0.1)
        one.mirostat_mu = sampled.mirostat_mu
        one.token_ids += sampled.token_ids
    assert sum(surprises[200:]) / 1800 == pytest.approx(4.0, abs=0.1)
