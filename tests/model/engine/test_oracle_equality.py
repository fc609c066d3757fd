"""What must not change the text does not, alone or two at a time: batching, chunking, prefix hits, preemption,
speculation, n choices, resuming, and the modes of attention they run over. Greedy and seeded."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from tests.model.weights.networks import saved_llama
from tokenrelay.model.config import EngineConfig
from tokenrelay.model.engine.engine import Engine
from tokenrelay.model.engine.request import Request
from tokenrelay.model.engine.scheduler import Scheduler
from tokenrelay.model.sampling_params import SamplingParams
from tokenrelay.model.structured.compiler import GrammarCompiler
from tokenrelay.model.structured.grammars import regex
from tokenrelay.model.transformer.kernels import native
from tokenrelay.model.weights.safetensors import SafetensorsCheckpoint

pytestmark = pytest.mark.skipif(
    not native.is_available(), reason="stock torch products depend on the batch; the README says so"
)

CPU = torch.device("cpu")
FEATURES = ("batching", "chunking", "prefix hit", "preemption", "speculation", "n", "resume")
MODES: dict[str, dict[str, Any]] = {
    "plain": {"num_blocks": 64},
    "8 bits": {"num_blocks": 64},  # of the weights
    "int8 cache": {"kv_cache_dtype": "int8", "num_blocks": 64},
    "attention sinks": {"attention_sinks": 4, "max_model_len": 48, "num_blocks": 64},
}
NUM_TOKENS = 24
EOS = 2


class Letters:
    """A vocabulary whose tokens are letters, words and pairs: a grammar's text can be written in several ways."""

    strips_leading_space = False
    special_ids = frozenset({0, 1, EOS})
    eos_token_ids = (EOS,)
    vocab_size = 64

    def token_bytes(self, token_id: int) -> bytes:
        letters = b"abcdefghijklmnopqrstuvwxyz "
        words = [b"", b"", b"", *(bytes([letter]) for letter in letters), b"hello", b" world", b"abc"]
        pairs = [bytes([letters[i], letters[-1 - i]]) for i in range(26)]
        return [*words, *pairs, *[b""] * 64][token_id]

    def encode(self, text: str, **_: bool) -> list[int]:
        return [3 + "abcdefghijklmnopqrstuvwxyz ".index(letter) for letter in text]


@dataclass(frozen=True)
class Case:
    """One request of the mix, in words of the caller."""

    name: str
    prompt: tuple[int, ...]
    params: SamplingParams

    def request(self, choice: int, emitted: Sequence[int] = (), mu: float | None = None) -> Request:
        params = replace(self.params, seed=self.params.seed + 100 * choice)
        constraint = COMPILER.compile(params.grammar).constraint() if params.grammar else None
        return Request(
            f"{self.name}/{choice}",
            self.prompt,
            params,
            output_token_ids=emitted,
            mirostat_mu=mu,
            constraint=constraint,
        )


COMPILER = GrammarCompiler(Letters())  # type: ignore[arg-type]
GRAMMAR = regex("(abc|hello world |[d-k]{3}xyz)*")  # full of forced letters


def _case(index: int, prompt: Sequence[int], **params: Any) -> Case:
    shared = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "seed": index, "logprobs": 1}
    return Case(f"{index}", tuple(prompt), SamplingParams(**(shared | params)))


CASES = (
    _case(0, range(3, 40), temperature=0),
    _case(1, [5, 6, 7, 8] * 6, temperature=0.3),  # cycles: drafts come true
    _case(2, range(3, 36), temperature=1.0, top_p=0.9),
    _case(3, [9, 9, 4] * 5, temperature=0, repetition_penalty=1.1, dry_multiplier=0.5),
    _case(4, [8, 8, 8], temperature=0.7, mirostat_tau=3.0),
    _case(6, range(3, 30), temperature=0, grammar=GRAMMAR, ignore_eos=False),
    _case(7, [4, 5, 6] * 4, temperature=1.0, grammar=GRAMMAR, ignore_eos=False, frequency_penalty=0.3),
    _case(5, [*range(3, 20), *range(3, 20)], temperature=0.2, min_p=0.1, presence_penalty=0.5),
)


@pytest.fixture(scope="module", params=MODES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """One network and cache per mode; every case gets a scheduler of its own over them."""
    folder = tmp_path_factory.mktemp("tiny")
    saved_llama(folder, vocab_size=64, max_position_embeddings=256, initializer_range=0.1)
    return Engine.from_checkpoint(
        SafetensorsCheckpoint(folder),
        EngineConfig(**MODES[request.param]),
        dtype=torch.bfloat16,
        device=CPU,
        quantization="int8" if request.param == "8 bits" else "none",
    )


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
    scheduler = Scheduler(config, num_blocks, loaded.max_model_len, [EOS], loaded.scheduler.window)
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
            emitted = oracle[name][:split]
            if len(emitted) < len(oracle[name]):
                mu = mus[name][split - 1] if split and case.params.mirostat_tau else None
                requests.append(case.request(choice, emitted, mu))
    return requests


@pytest.fixture(scope="module")
def oracle(engine: Engine) -> tuple[dict[str, list[int]], dict[str, list[float]]]:
    """Every choice of every case alone, whole and unshared; and mirostat's state behind each token."""
    plain = with_features(engine, [])
    outputs: dict[str, list[int]] = {}
    mus: dict[str, list[float]] = {}
    for case, choice in itertools.product(CASES, range(3)):
        request = case.request(choice)
        plain.add(request)
        mus[request.request_id] = []
        while plain.has_work:
            mus[request.request_id] += [step.mirostat_mu or 0.0 for step in plain.step()]
        outputs[request.request_id] = request.output_token_ids
    return outputs, mus


def test_what_a_grammar_allows_is_written(oracle: tuple[dict[str, list[int]], dict[str, list[float]]]) -> None:
    letters = Letters()
    for name, token_ids in oracle[0].items():
        if name.startswith(("6/", "7/")):
            text = b"".join(map(letters.token_bytes, token_ids)).decode()
            whole = re.fullmatch("(abc|hello world |[d-k]{3}xyz)*", text)
            assert whole or (len(token_ids) == NUM_TOKENS and re.match("(abc|hello world |[d-k]{3}xyz)+", text))
            assert (token_ids[-1] == EOS) <= bool(whole)


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
