"""Log-probabilities against their definition, row by row."""

from __future__ import annotations

import pytest
import torch

from tests.model.engine.drawing import draw
from tokenrelay.model.engine.logprobs import token_logprobs
from tokenrelay.model.engine.request import Request
from tokenrelay.model.engine.sampler import Sampler
from tokenrelay.model.engine.step import ScheduledRequest
from tokenrelay.model.sampling_params import SamplingParams


def test_they_are_the_log_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 300) * 4
    expected = logits.double().log_softmax(-1)
    found = token_logprobs(logits, [3, 0, 299, 7, 7], 4)
    for row, one in enumerate(found):
        assert one.logprob == pytest.approx(float(expected[row, one.token_id]), abs=1e-5)
        assert one.rank == 1 + int((logits[row] > logits[row, one.token_id]).sum())
        best = expected[row].topk(4)
        assert [token_id for token_id, _ in one.top] == best.indices.tolist()
        assert [logprob for _, logprob in one.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_a_row_s_numbers_do_not_depend_on_the_other_rows() -> None:
    torch.manual_seed(0)
    logits = torch.randn(9, 50_000)
    together = token_logprobs(logits, range(9), 3)
    assert together == [token_logprobs(logits[i : i + 1], [i], 3)[0] for i in range(9)]


def test_penalties_and_temperature_do_not_change_them() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 50)
    params = SamplingParams(max_tokens=9, temperature=2.0, seed=5, logit_bias=((4, 9.0),), top_k=5, logprobs=2)
    request = Request("r", [1], params)
    sampled = Sampler([]).sample(logits.clone(), [ScheduledRequest(request, 1)])[0]
    assert sampled.logprobs == tuple(token_logprobs(logits, sampled.token_ids, 2))


def test_none_are_computed_for_nobody() -> None:
    request = Request("r", [1], SamplingParams(max_tokens=9))
    assert Sampler([]).sample(torch.randn(1, 50), [ScheduledRequest(request, 1)])[0].logprobs == ()
    assert len(draw(torch.randn(1, 50), [request])) == 1
