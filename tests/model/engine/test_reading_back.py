"""The host waits for the device once per step: for the ids and their probabilities, whatever the rows ask for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tests.model.fake_cuda import CUDA, fake_cuda
from tokenrelay.model.engine.request import Request
from tokenrelay.model.engine.sampler import Sampler
from tokenrelay.model.engine.step import ScheduledRequest
from tokenrelay.model.sampling_params import SamplingParams

ASKED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7, "min_tokens": 2},
    {"top_p": 0.9, "top_k": 5, "min_p": 0.1},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "logit_bias": ((3, 1.0),)},
    {"allowed_token_ids": (1, 2, 3)},
    {"mirostat_tau": 5.0},
    {"typical_p": 0.9, "top_n_sigma": 1.0},
]


def entries() -> list[ScheduledRequest]:
    return [
        ScheduledRequest(Request(str(i), [5, 6], SamplingParams(max_tokens=9, **a)), 1) for i, a in enumerate(ASKED)
    ]


def test_a_step_s_rows_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, ...]] = []

    def tolist(tensor: Tensor) -> Any:
        read.append(tuple(tensor.shape))
        return tensor.numpy().tolist()

    monkeypatch.setattr(Tensor, "tolist", tolist)
    Sampler([0]).sample(torch.randn(len(ASKED), 16), entries())
    assert read == [(len(ASKED), 2)]


def test_nothing_else_asks_for_a_value_or_mixes_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake tensor has no values: whatever looked at one would raise."""
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: [[1.0, 0.5]] * len(tensor))
    with fake_cuda():
        sampled = Sampler([0]).sample(torch.empty(len(ASKED), 16, device=CUDA), entries())
    assert [one.token_ids for one in sampled] == [(1,)] * len(ASKED)
