"""The numbers mean what their names say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenrelay.bench.figures import Bounds, Figures, figures, percentile
from tokenrelay.bench.measured import Measured, Run

ANYTHING = Bounds()


def steady(*, started: float = 0.0, first: float, gap: float, tokens: int) -> Measured:
    """A token per chunk, at an even pace; ends with its last."""
    arrivals = [started + first + gap * i for i in range(tokens)]
    return Measured(started, arrivals[-1], arrivals, prompt_tokens=100, output_tokens=tokens)


def of(*requests: Measured, seconds: float = 10.0, bounds: Bounds = ANYTHING, alone: bool = False) -> Figures:
    return figures(Run(list(requests), seconds), bounds, alone=alone)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1))
def test_percentiles_are_nearest_ranks(values: list[float], share: float) -> None:
    value = percentile(values, share)
    not_above = sum(other <= value for other in values)
    below = sum(other < value for other in values)
    assert value in values
    assert not_above >= share * len(values) > below or value == min(values)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_percentiles_are_numpys(share: float) -> None:
    values = np.random.default_rng(0).normal(size=101).tolist()
    assert percentile(values, share) == np.quantile(values, share, method="inverted_cdf")


def test_a_steady_stream_has_one_gap() -> None:
    seen = of(steady(started=5, first=0.5, gap=0.02, tokens=11))
    expected = {"ttft": 500, "gap": 20, "tpot": 20, "e2e": 700}
    for name, value in expected.items():
        assert [seen[f"{name}_p{share}_ms"] for share in (50, 90, 99)] == pytest.approx([value] * 3)


def test_rates_are_per_second_of_the_run() -> None:
    seen = of(*[steady(first=1, gap=0.1, tokens=20)] * 5, seconds=10)
    assert seen["output_tokens_per_second"] == 10
    assert seen["prompt_tokens_per_second"] == 50
    assert seen["requests_per_second"] == 0.5


def test_several_tokens_in_a_chunk_make_gaps_longer_but_not_the_time_per_token() -> None:
    pairs = Measured(0, 1.1, [0.1 + 0.2 * i for i in range(6)], output_tokens=11)
    seen = of(pairs)
    assert seen["gap_p50_ms"] == pytest.approx(200)
    assert seen["tpot_p50_ms"] == pytest.approx(100)
    assert seen["tokens_per_chunk"] == pytest.approx(11 / 6)


def test_prefill_speed_is_that_of_a_request_alone() -> None:
    request = steady(first=0.5, gap=0.1, tokens=2)
    assert of(request, alone=True)["prefill_tokens_per_second"] == pytest.approx(200)
    assert "prefill_tokens_per_second" not in of(request)


def test_goodput_counts_who_kept_both_bounds() -> None:
    good = steady(first=0.1, gap=0.01, tokens=10)
    late = steady(first=0.3, gap=0.01, tokens=10)
    slow = steady(first=0.1, gap=0.03, tokens=10)
    seen = of(good, late, slow, seconds=1, bounds=Bounds(ttft_ms=200, gap_ms=20))
    assert seen["goodput_requests_per_second"] == 1
    assert "goodput_requests_per_second" not in of(good, late, slow)


def test_what_failed_is_counted_and_not_measured() -> None:
    failed = Measured(0, 9, [8.0], output_tokens=1, error="no")
    refused = Measured(0, 9, error="503: full", refused=True)
    good = steady(first=0.1, gap=0.01, tokens=10)
    seen = of(failed, refused, good)
    assert (seen["requests"], seen["refused"], seen["errors"]) == (1, 1, 1)
    assert {**seen, "refused": 0, "errors": 0} == of(good)


def test_nothing_measured_is_no_figure() -> None:
    seen = of(Measured(0, 9, error="503: full", refused=True), alone=True)
    assert seen["output_tokens_per_second"] == 0
    assert not [name for name in seen if name.endswith("_ms")]
