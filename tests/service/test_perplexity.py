"""The service's prompt_logprobs give the perplexity that transformers computes: network, cache and sampler as one."""

from __future__ import annotations

import math
from pathlib import Path

import httpx
import pytest
import torch

from tests.model.smollm2_oracle import load_oracle
from tests.service.running import MODEL, RunningService
from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.model.weights.sources import resolve

TEXT = (Path(__file__).parents[1] / "model/data/genesis.txt").read_text()  # King James Version, chapters 1 to 3


def perplexity_of(service: RunningService, token_ids: list[int]) -> float:
    body = {"model": MODEL, "prompt": token_ids, "max_tokens": 1, "prompt_logprobs": 0}
    answer = httpx.post(f"{service.url}/v1/completions", json=body, timeout=300).raise_for_status().json()
    first, *others = answer["choices"][0]["prompt_logprobs"]
    assert first is None
    logprobs = [entry[str(token)]["logprob"] for entry, token in zip(others, token_ids[1:], strict=True)]
    return math.exp(-math.fsum(logprobs) / len(logprobs))


@torch.inference_mode()
def perplexity_of_transformers(path: Path, token_ids: list[int]) -> float:
    logits = load_oracle(path)(torch.tensor([token_ids]), use_cache=False).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(token_ids[1:]))
    return math.exp(float(losses))


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"dtype": "float32", "quantization": "none"}, 0.001),
        ({"quantization": "none"}, 0.005),
        ({}, 0.01),
        ({"quantization": "int8"}, 0.01),
    ],
    ids=["float32", "bfloat16", "auto", "int8"],
)
def test_perplexity_equals_transformers(
    options: dict[str, str], tolerance: float, smollm2_path: Path, tmp_path: Path
) -> None:
    token_ids = Tokenizer.from_source(resolve(str(smollm2_path))).encode(TEXT, add_special_tokens=False)
    with RunningService(tmp_path, **options) as service:
        ours = perplexity_of(service, token_ids)
    theirs = perplexity_of_transformers(smollm2_path, token_ids)
    print(f"{options}: {len(token_ids)} tokens, ours {ours:.4f}, transformers {theirs:.4f}, {ours / theirs - 1:+.3%}")
    assert ours == pytest.approx(theirs, rel=tolerance)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_an_int8_cache_costs_little_perplexity(smollm2_path: Path, tmp_path: Path) -> None:
    token_ids = Tokenizer.from_source(resolve(str(smollm2_path))).encode(TEXT, add_special_tokens=False)
    found = {}
    for kind in ("auto", "int8"):
        (tmp_path / kind).mkdir()
        with RunningService(tmp_path / kind, kv_cache_dtype=kind) as service:
            found[kind] = perplexity_of(service, token_ids)
    print(found)
    assert found["int8"] == pytest.approx(found["auto"], rel=0.01)
