"""The real model: the same ids as a slow oracle, and the same ids alone or under load."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from tests.model.generation import generate
from tests.model.smollm2_oracle import load_oracle
from tokenrelay.model.config import EngineConfig
from tokenrelay.model.engine.engine import Engine
from tokenrelay.model.engine.request import Request
from tokenrelay.model.engine.scheduler import Scheduler
from tokenrelay.model.sampling_params import Pooling, SamplingParams
from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.model.transformer.kernels import native
from tokenrelay.model.weights.checkpoint import Checkpoint, open_checkpoint
from tokenrelay.model.weights.sources import resolve

CPU = torch.device("cpu")
EOS = [2]
QUESTIONS = (
    *("What is the capital of France?", "Write a haiku about autumn.", "Explain gravity to a child."),
    *("List three prime numbers.", "Who wrote Hamlet?", "Translate 'good morning' to Spanish."),
    *("What is 12 times 12?", "Describe the taste of a lemon.", "Name the planets of the solar system."),
    *("How do I boil an egg?", "What does HTTP stand for?", "Give me a recipe for pancakes."),
    *("Why is the sky blue?", "Tell me a joke about cats.", "What is a binary search?"),
    *("Summarise the story of Cinderella.", "What year did the Berlin Wall fall?", "Define entropy."),
    *("Write a Python function that reverses a string.", "What is the largest ocean?"),
)


@pytest.fixture(scope="module")
def checkpoint(smollm2_path: Path) -> Checkpoint:
    return open_checkpoint(resolve(str(smollm2_path)))


@pytest.fixture(scope="module")
def prompts(smollm2_path: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_source(resolve(str(smollm2_path)))
    return [tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]


def make_engine(checkpoint: Checkpoint, dtype: torch.dtype, **config: int | bool) -> Engine:
    return Engine.from_checkpoint(checkpoint, EngineConfig(**config), dtype=dtype, device=CPU)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def oracle(smollm2_path: Path) -> LlamaForCausalLM:
    return load_oracle(smollm2_path)


@pytest.fixture(scope="module")
def exact(checkpoint: Checkpoint) -> Engine:
    return make_engine(checkpoint, torch.float32)


@pytest.mark.timeout(600)
@torch.inference_mode()
def test_greedy_ids_equal_an_uncached_oracle(
    exact: Engine, prompts: Sequence[list[int]], oracle: LlamaForCausalLM
) -> None:
    """By induction: if after every prefix the oracle's best token is ours, its greedy text is ours."""
    params = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)
    requests = [Request(str(i), prompt, params) for i, prompt in enumerate(prompts)]
    generated = generate(exact, requests)
    for name, prompt in enumerate(prompts):
        output = generated[str(name)]
        logits = oracle(torch.tensor([prompt + output]), use_cache=False).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist() == output


@pytest.mark.timeout(600)
@torch.inference_mode()
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_equal_those_of_the_oracle(
    exact: Engine, prompts: Sequence[list[int]], oracle: LlamaForCausalLM, pooling: Pooling
) -> None:
    for prompt in prompts[:3]:
        exact.add(Request("one", prompt, SamplingParams(max_tokens=1), pooling=pooling))
        [output] = exact.step()
        hidden = oracle.model(torch.tensor([prompt]), use_cache=False).last_hidden_state[0].double()
        state = hidden.mean(dim=0) if pooling == "mean" else hidden[-1]
        expected = (state / state.norm()).tolist()
        assert np.frombuffer(output.embedding, "<f4").tolist() == pytest.approx(expected, abs=1e-4)


def varied_requests(prompts: Sequence[list[int]], max_tokens: int) -> list[Request]:
    """32 of them: greedy and seeded, short and of several blocks, some with a common beginning."""
    requests = []
    for index in range(32):
        start = 0 if index % 4 else 20  # with the template's system message in front, or without
        prompt = prompts[index % len(prompts)][start:] + (prompts[3][-12:] if index % 3 else [])
        params = SamplingParams(
            max_tokens=max_tokens, seed=index, temperature=index % 2, top_p=0.95 if index % 4 else 1.0
        )
        requests.append(Request(str(index), prompt, params))
    return requests


@pytest.mark.timeout(600)
@pytest.mark.skipif(not native.is_available(), reason="stock torch products depend on the batch; the README says so")
def test_a_request_gives_the_same_ids_alone_and_in_any_batch(
    checkpoint: Checkpoint, prompts: Sequence[list[int]]
) -> None:
    max_tokens = 10
    alone = make_engine(checkpoint, torch.bfloat16, enable_prefix_caching=False)
    expected: dict[str, list[int]] = {}
    for request in varied_requests(prompts, max_tokens):
        expected |= generate(alone, [request])
    rng = random.Random(0)
    for _ in range(8):
        engine = make_mixed_engine(alone, rng)
        mix = rng.sample(varied_requests(prompts, max_tokens), rng.randint(3, 18))
        for request in mix:
            split = rng.randrange(max_tokens)  # some arrive from another worker that had begun
            request.token_ids += expected[request.request_id][:split] if rng.random() < 0.3 else []
        unfinished = [r for r in mix if r.output_token_ids != expected[r.request_id]]
        assert generate_staggered(engine, unfinished, rng) == {r.request_id: expected[r.request_id] for r in unfinished}


def make_mixed_engine(loaded: Engine, rng: random.Random) -> Engine:
    """Another scheduler over the same network: its own budget, batch limit, cache size and prefix cache."""
    max_num_seqs = rng.choice([4, 12, 32])
    config = EngineConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=rng.choice([max_num_seqs + 16, 64, 300]),
        enable_prefix_caching=rng.random() < 0.7,
    )
    num_blocks = rng.choice([24, 64, 512])
    return Engine(Scheduler(config, num_blocks, 16 * num_blocks, EOS), loaded.runner, 16 * num_blocks)


def generate_staggered(engine: Engine, requests: Sequence[Request], rng: random.Random) -> dict[str, list[int]]:
    """Requests arrive while others are running."""
    waiting = list(requests)
    while waiting or engine.has_work:
        while waiting and (not engine.has_work or rng.random() < 0.4):
            engine.add(waiting.pop())
        engine.step()
    engine.scheduler.check_integrity()
    return {request.request_id: request.output_token_ids for request in requests}
