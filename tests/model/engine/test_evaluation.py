"""The perplexity of a text is that of transformers, in one window and in many."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.model.weights.networks import tiny_llama
from tokenrelay.model.engine.engine import Engine
from tokenrelay.model.engine.evaluation import engine_config, perplexity, speed, windows
from tokenrelay.model.weights.safetensors import SafetensorsCheckpoint

IDS = [3 + i * i % 90 for i in range(100)]


@pytest.fixture(scope="module")
def network() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def engine(network: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder: Path = tmp_path_factory.mktemp("tiny")
    network.save_pretrained(folder)
    return Engine.from_checkpoint(
        SafetensorsCheckpoint(folder), engine_config(100), dtype=torch.float32, device=torch.device("cpu")
    )


@torch.inference_mode()
def loss(network: LlamaForCausalLM, ids: list[int], scored: int) -> float:
    logits = network(torch.tensor([ids]), use_cache=False).logits[0, scored - 1 : -1].double()
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[scored:]), reduction="sum"))


@pytest.mark.parametrize(("context", "stride"), [(100, 50), (40, 20), (33, 32), (16, 1)])
def test_perplexity_is_transformers(network: LlamaForCausalLM, engine: Engine, context: int, stride: int) -> None:
    told: list[int] = []
    total = sum(loss(network, IDS[w.begin : w.end], w.scored - w.begin) for w in windows(100, context, stride))
    assert perplexity(engine, IDS, context, stride, told.append) == pytest.approx(math.exp(total / 99), rel=1e-4)
    assert sum(told) == 99


@pytest.mark.parametrize(("context", "stride"), [(100, 50), (40, 20), (33, 32), (7, 3)])
def test_every_token_but_the_first_counts_once(context: int, stride: int) -> None:
    counted = [i for window in windows(100, context, stride) for i in range(window.scored, window.end)]
    assert counted == list(range(1, 100))
    assert all(window.begin < window.scored for window in windows(100, context, stride))


def test_speed_is_measured(engine: Engine) -> None:
    measured = speed(engine, IDS, 60)
    assert measured.prefill > 0
    assert measured.decode > 0
    assert not engine.has_work
