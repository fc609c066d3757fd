"""What must not change the text does not, alone or two at a time: batching, chunking, prefix hits, preemption,
speculation, n choices, resuming, and the modes of attention they run over. Greedy and seeded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokenrelay.model.config import EngineConfig
from tokenrelay.model.engine.engine import Engine
from tokenrelay.model.engine.request import Request
from tokenrelay.model.engine.scheduler import Scheduler
from tokenrelay.model.sampling_params import SamplingParams
from tokenrelay.model.transformer.kernels import native
from tokenrelay.model.weights.safetensors import SafetensorsCheckpoint

pytestmark = pytest.mark.skipif(
    not native.is_available(), reason="stock torch products depend on the batch; the README says so"
)

CPU = torch.device("cpu")
FEATURES = ("batching", "chunking", "prefix hit", "preemption", "speculation", "n", "resume")
MODES: dict[str, dict[str, Any]] = {
    "plain": {"num_blocks": 64},
    "int8 cache": {"kv_cache_dtype": "int8", "num_blocks": 64},
    "attention sinks": {"attention_sinks": 4, "max_model_len": 48, "num_blocks": 64},
}
NUM_TOKENS = 24


@dataclass(frozen=True)
class Case:
    """One request of the mix, in words of the caller."""

    name: str
    prompt: tuple[int, ...]
    params: SamplingParams


def _case(index: int, prompt: Sequence[int], **params: float) -> Case:
    shared = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "seed": index, "logprobs": 1}
    return Case(f"{index}", tuple(prompt), SamplingParams(**(shared | params)))  # type: ignore[arg-type]


CASES = (
    _case(0, range(3, 40), temperature=0),
    _case(1, [5, 6, 7, 8] * 6, temperature=0.3),  # cycles: drafts come true
    _case(2, range(3, 36), temperature=1.0, top_p=0.9),
    _case(3, [9, 9, 4] * 5, temperature=0, repetition_penalty=1.1, dry_multiplier=0.5),
    _case(4, [8, 8, 8], temperature=0.7, mirostat_tau=3.0),
    _case(5, [*range(3, 20), *range(3, 20)], temperature=0.2, min_p=0.1, presence_penalty=0.5),
)


@pytest.fixture(scope="module", params=MODES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """One network and cache per mode; every case gets a scheduler of its own over them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    engine_config = EngineConfig(**MODES[request.param])
    return Engine.from_checkpoint(SafetensorsCheckpoint(folder), engine_config, dtype=torch.bfloat16, device=CPU)


def with_features(loaded: Engine, features: Sequence[str]) -> Engine:
    """The same network under a scheduler with these features on, and all others off."""
    config = replace(
        loaded.scheduler.config,
        max_num_seqs=12 if {"batching", "n", "preemption"} & set(features) else 1,
        max_num_batched_tokens=19 if "chunking" in features else 512,
        enable_prefix_caching=bool({"prefix hit", "n"} & set(features)),
        num_speculative_tokens=6 if "speculation" in features else 0,
    )
    num_blocks = 10 if "preemption" in features else 64
    scheduler = Scheduler(config, num_blocks, loaded.max_model_len, [], loaded.scheduler.window)
    return Engine(scheduler, loaded.runner, loaded.max_model_len)


def run(engine: Engine, requests: Sequence[Request]) -> dict[str, list[int]]:
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
    engine.scheduler.check_integrity()
    return {request.request_id: request.output_token_ids for request in requests}


def requests_of(features: Sequence[str], oracle: dict[str, list[int]], mus: dict[str, list[float]]) -> list[Request]:
    requests = []
    for case in CASES:
        split = 7 + len(case.prompt) % 5 if "resume" in features else 0
        for choice in range(3 if "n" in features else 1):
            name = f"{case.name}/{choice}"
            params = replace(case.params, seed=case.params.seed + 100 * choice)
            emitted = oracle[name][:split]
            mu = mus[name][split - 1] if split and params.mirostat_tau else None
            requests.append(Request(name, case.prompt, params, output_token_ids=emitted, mirostat_mu=mu))
    return requests


@pytest.fixture(scope="module")
def oracle(engine: Engine) -> tuple[dict[str, list[int]], dict[str, list[float]]]:
    """Every choice of every case alone, whole and unshared; and mirostat's state behind each token."""
    plain = with_features(engine, [])
    outputs: dict[str, list[int]] = {}
    mus: dict[str, list[float]] = {}
    for case, choice in itertools.product(CASES, range(3)):
        name = f"{case.name}/{choice}"
        params = replace(case.params, seed=case.params.seed + 100 * choice)
        request = Request(name, case.prompt, params)
        plain.add(request)
        mus[name] = []
        while plain.has_work:
            mus[name] += [step.mirostat_mu or 0.0 for step in plain.step()]
        outputs[name] = request.output_token_ids
    return outputs, mus


PAIRS = [*((feature,) for feature in FEATURES), *itertools.combinations(FEATURES, 2), FEATURES]


@pytest.mark.parametrize("features", PAIRS, ids=" and ".join)
def test_the_ids_are_those_of_the_oracle(
    engine: Engine, oracle: tuple[dict[str, list[int]], dict[str, list[float]]], features: Sequence[str]
) -> None:
    tried = with_features(engine, features)
    if "prefix hit" in features:
        run(tried, [Request(f"warm {c.name}", c.prompt, SamplingParams(max_tokens=1)) for c in CASES])
    found = run(tried, requests_of(features, *oracle))
    assert found == {name: oracle[0][name] for name in found}
    scheduler = tried.scheduler
    assert ("preemption" in features) == (scheduler.num_preemptions > 0)
    assert ("speculation" in features) == (scheduler.num_accepted_tokens > 0)
    if {"prefix hit", "n"} & set(features) and "preemption" not in features:
        assert scheduler.num_prefix_hits > 0
