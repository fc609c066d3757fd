"""Embeddings: what an uncached forward pass in fp32 gives, and the same bits whatever happens around a request."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from tests.model.weights.networks import saved_llama
from tokenrelay.model.config import EngineConfig
from tokenrelay.model.engine.engine import Engine
from tokenrelay.model.engine.pooling import unit
from tokenrelay.model.engine.request import Request
from tokenrelay.model.engine.scheduler import Scheduler
from tokenrelay.model.engine.step import StepOutput
from tokenrelay.model.sampling_params import FinishReason, Pooling, SamplingParams
from tokenrelay.model.transformer.kernels import native
from tokenrelay.model.weights.safetensors import SafetensorsCheckpoint

CPU = torch.device("cpu")
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
LENGTHS = (1, 2, 15, 16, 17, 40, 100, 33)
PROMPTS = {length: [3 + (7 * length + i * i) % 60 for i in range(length)] for length in LENGTHS}
CONTEXT = 128
MODES: dict[str, EngineConfig] = {
    "plain": EngineConfig(num_blocks=64),
    "8 bits": EngineConfig(num_blocks=64),  # of the weights
    "int8 cache": EngineConfig(num_blocks=64, kv_cache_dtype="int8"),
    "attention sinks": EngineConfig(num_blocks=64, attention_sinks=4, max_model_len=48),
}
bit_for_bit = pytest.mark.skipif(not native.is_available(), reason="stock torch products depend on the batch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    return saved_llama(path, vocab_size=64, max_position_embeddings=CONTEXT, initializer_range=0.1)


def load(folder: Path, dtype: torch.dtype, mode: str = "plain") -> Engine:
    checkpoint = SafetensorsCheckpoint(folder)
    return Engine.from_checkpoint(
        checkpoint, MODES[mode], dtype=dtype, device=CPU, quantization="int8" if mode == "8 bits" else "none"
    )


@pytest.fixture(scope="module", params=MODES)
def engine(request: pytest.FixtureRequest, folder: Path) -> Engine:
    return load(folder, torch.bfloat16, request.param)


def anew(loaded: Engine, num_blocks: int = 64, **config: int | bool) -> Engine:
    """The same network under another scheduler, with an empty cache."""
    changed = replace(loaded.scheduler.config, **config)  # type: ignore[arg-type]
    scheduler = Scheduler(changed, num_blocks, loaded.max_model_len, [2], loaded.scheduler.window)
    return Engine(scheduler, loaded.runner, loaded.max_model_len)


def embedding_request(name: str, prompt: Sequence[int], pooling: Pooling) -> Request:
    return Request(name, prompt, SamplingParams(max_tokens=1), pooling=pooling)


def embed(engine: Engine, requests: Iterable[Request]) -> dict[str, bytes]:
    return {name: output.embedding for name, output in run(engine, requests).items() if output.embedding}


def run(engine: Engine, requests: Iterable[Request]) -> dict[str, StepOutput]:
    """Each request's last output."""
    for request in requests:
        engine.add(request)
    last: dict[str, StepOutput] = {}
    while engine.has_work:
        last |= {output.request_id: output for output in engine.step()}
    engine.scheduler.check_integrity()
    return last


def all_prompts() -> list[Request]:
    return [embedding_request(f"{p} {n}", PROMPTS[n], p) for n, p in itertools.product(LENGTHS, POOLINGS)]


@pytest.fixture(scope="module")
def alone(engine: Engine) -> dict[str, bytes]:
    """Every prompt by itself, whole, and nothing known of it."""
    return {
        name: embedding
        for request in all_prompts()
        for name, embedding in embed(anew(engine, enable_prefix_caching=False), [request]).items()
    }


@torch.inference_mode()
def test_embeddings_are_those_of_a_plain_forward_pass(folder: Path) -> None:
    oracle = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = embed(load(folder, torch.float32), all_prompts())
    assert len(found) == len(LENGTHS) * len(POOLINGS)
    for length, prompt in PROMPTS.items():
        hidden = oracle.model(torch.tensor([prompt]), use_cache=False).last_hidden_state[0].double().numpy()
        for pooling, state in (("mean", hidden.mean(axis=0)), ("last", hidden[-1])):
            embedding = np.frombuffer(found[f"{pooling} {length}"], "<f4")
            assert embedding == pytest.approx(state / np.linalg.norm(state), abs=1e-5)
            assert np.linalg.norm(embedding) == pytest.approx(1, abs=1e-6)


AROUND: dict[str, dict[str, int | bool]] = {
    "in one batch": {},
    "in chunks of a few tokens": {"max_num_batched_tokens": 13, "max_num_seqs": 4},
    "token by token": {"max_num_batched_tokens": 1, "max_num_seqs": 1},
    "beside streams, with drafts": {"num_speculative_tokens": 6, "max_prefill_tokens_beside_decodes": 5},
    "with preemptions": {"num_blocks": 8, "max_num_batched_tokens": 8, "max_num_seqs": 4},
    "without shared blocks": {"enable_prefix_caching": False},
}


@bit_for_bit
@pytest.mark.parametrize("around", AROUND)
def test_what_happens_around_a_request_changes_no_bit(engine: Engine, alone: dict[str, bytes], around: str) -> None:
    tried = anew(engine, **AROUND[around])
    greedy = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    streams = [Request(f"stream {i}", [5, 6, 7, 8] * (i + 1), greedy) for i in range(3)]
    embedded = all_prompts()
    last = run(tried, [*streams, *embedded])
    assert {name: output.embedding for name, output in last.items() if output.embedding} == alone
    assert all((len(stream.output_token_ids), last[stream.request_id].embedding) == (40, b"") for stream in streams)
    assert ("preemptions" in around) == any(r.num_preemptions for r in embedded if r.pooling == "mean")


@bit_for_bit
def test_a_known_beginning_changes_no_bit(engine: Engine, alone: dict[str, bytes]) -> None:
    tried = anew(engine)
    generated = [Request(f"warm {n}", PROMPTS[n], SamplingParams(max_tokens=1)) for n in LENGTHS]
    run(tried, generated)
    last = run(tried, all_prompts())
    assert {name: output.embedding for name, output in last.items()} == alone
    for length in LENGTHS[1:]:
        assert last[f"mean {length}"].num_cached_tokens == 0  # every token has a part in it
        assert last[f"last {length}"].num_cached_tokens == length - 1


@bit_for_bit
def test_what_an_embedding_computed_is_known_to_a_generation(engine: Engine) -> None:
    greedy = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    oracle, tried = Request("oracle", PROMPTS[40], greedy), Request("tried", PROMPTS[40], greedy)
    run(anew(engine), [oracle])
    warm = anew(engine)
    run(warm, [embedding_request("embedding", PROMPTS[40], "mean")])
    run(warm, [tried])
    assert (tried.output_token_ids, tried.num_cached_tokens) == (oracle.output_token_ids, 39)


def test_an_embedding_is_one_output_without_tokens(engine: Engine) -> None:
    tried = anew(engine, max_num_batched_tokens=16, max_num_seqs=4)
    tried.add(embedding_request("a", PROMPTS[33], "mean"))
    outputs = [output for _ in range(3) for output in tried.step()]
    [output] = outputs
    assert (output.token_ids, output.finish_reason, len(output.embedding)) == ((), FinishReason.STOP, 4 * 64)
    assert not tried.has_work
    assert tried.scheduler.block_pool.usage == 0


@pytest.mark.parametrize("pooling", POOLINGS)
def test_no_logits_are_computed_for_it(folder: Path, monkeypatch: pytest.MonkeyPatch, pooling: Pooling) -> None:
    loaded = load(folder, torch.bfloat16)
    monkeypatch.setattr(loaded.runner.model, "compute_logits", None)
    assert embed(loaded, [embedding_request("a", PROMPTS[17], pooling)])


def test_a_prompt_may_fill_the_whole_context_and_the_whole_cache(folder: Path) -> None:
    full = anew(load(folder, torch.bfloat16), num_blocks=CONTEXT // 16)
    assert embed(full, [embedding_request("full", [5] * CONTEXT, "mean")])
    with pytest.raises(ValueError, match="129 tokens"):
        full.add(embedding_request("longer", [5] * (CONTEXT + 1), "mean"))
    with pytest.raises(ValueError, match="128 tokens"):
        full.add(Request("generated", [5] * CONTEXT, SamplingParams(max_tokens=1)))


def test_an_aborted_embedding_gives_its_blocks_back(engine: Engine) -> None:
    tried = anew(engine, max_num_batched_tokens=16, max_num_seqs=4)
    tried.add(embedding_request("a", PROMPTS[100], "mean"))
    assert tried.step() == []
    tried.abort("a")
    assert not tried.has_work
    assert tried.scheduler.block_pool.usage == 0


def test_a_vector_of_zeros_stays_one() -> None:
    assert unit(np.zeros(3)) == bytes(12)
