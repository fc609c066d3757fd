"""The forward pass of every family's switches on a GPU that is not there: shapes, types, devices and signatures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.model.fake_cuda import BLOCK, fake_cuda, fake_executor
from tests.model.families.networks import TINY
from tokenrelay.model.config import Experts, ModelConfig
from tokenrelay.model.engine.executor import StepInputs
from tokenrelay.model.families import read_hf_config
from tokenrelay.model.transformer.layers import LayerNorm, RMSNorm

CONTEXT = 600
LLAMA = ModelConfig(
    architecture="llama",
    vocab_size=64,
    hidden_size=128,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_position_embeddings=CONTEXT,
    norm="rms",
    norm_eps=1e-5,
    activation="silu",
    gated_mlp=True,
    positions="rotary",
)
GPT2 = replace(
    LLAMA,
    architecture="gpt2",
    num_kv_heads=4,
    norm="layer",
    activation="gelu_tanh",
    gated_mlp=False,
    positions="learned",
    attention_bias=True,
    output_bias=True,
    mlp_bias=True,
)
GEMMA2 = replace(
    LLAMA,
    norm_placement="sandwich",
    attention_softcap=50.0,
    logits_softcap=30.0,
    embedding_scale=11.3,
    sliding_window=9,
    full_attention_layers=frozenset({1}),
    tie_word_embeddings=True,
)
GPT_OSS = replace(
    LLAMA,
    activation="swiglu_oai",
    learned_sinks=True,
    attention_bias=True,
    sliding_window=9,
    full_attention_layers=frozenset({1}),
    experts=Experts(num_experts=4, num_experts_per_token=2, intermediate_size=32, router_bias=True),
)
CONFIGS = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "sliding window": replace(LLAMA, sliding_window=9),
    "gemma 2": GEMMA2,
    "gemma 3": replace(LLAMA, norm_placement="sandwich", qk_norm="head", local_rope_theta=5_000.0, sliding_window=9),
    "olmo 2": replace(LLAMA, norm_placement="post", qk_norm="whole"),
    "neox": replace(GPT2, parallel_residual=True, positions="rotary", rotary_dim=8),
    "phi 2": replace(GPT2, parallel_residual=True, shared_norm=True, positions="rotary", rotary_dim=8),
    "stablelm": replace(LLAMA, norm="layer", norm_bias=False, rotary_dim=8),
    "smollm 3": replace(LLAMA, unrotated_layers=frozenset({1})),
    "granite": replace(LLAMA, attention_scale=0.1, residual_scale=0.2, logits_scale=0.3),
    "opt 350m": replace(GPT2, norm_placement="after_sum", final_norm=False, activation="relu"),
    "vaswani": replace(GPT2, norm_placement="after_sum", final_norm=False, activation="relu", positions="sinusoidal"),
    "mixtral": replace(LLAMA, experts=Experts(num_experts=4, num_experts_per_token=2, intermediate_size=32)),
    "gpt-oss": GPT_OSS,
}


def mixed_step() -> StepInputs:
    """A prompt's chunk of 20 tokens, and one token of a sequence of three blocks."""
    tokens = np.zeros(21, dtype=np.int64)
    tables, lens = np.zeros((2, 3), dtype=np.int32), np.array([20, 2 * BLOCK + 5], dtype=np.int32)
    starts, results = np.array([0, 20, 21], dtype=np.int32), np.array([0, 1], dtype=np.int32)
    return StepInputs(tokens, tokens, tokens, tables, starts, lens, results)


@pytest.mark.parametrize("family", [name for name in TINY if "," not in name])
def test_every_family_runs_a_step(family: str) -> None:
    config = read_hf_config(TINY[family]().config.to_dict())
    with fake_cuda():
        executor = fake_executor(config, torch.bfloat16, 64)
        logits = executor.compute_logits(executor.forward(mixed_step()))
    assert tuple(logits.shape) == (21, config.vocab_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_mixed_step_of_a_prompt_s_chunk_and_a_decode(config: ModelConfig, dtype: torch.dtype) -> None:
    with fake_cuda():
        executor = fake_executor(config, dtype, CONTEXT)
        hidden = executor.forward(mixed_step())
        logits = executor.compute_logits(hidden)
    assert (tuple(hidden.shape), hidden.dtype, hidden.device.type) == ((21, 128), dtype, "cuda")
    assert (tuple(logits.shape), logits.dtype, logits.device.type) == ((21, 64), torch.float32, "cuda")


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["rms", "layer"])
def test_norms_keep_their_weights_in_fp32_beside_matrices_in_bf16(config: ModelConfig) -> None:
    """Gemma's norms multiply by 1 + weight, which is one number here: bf16 would round the weight away."""
    with fake_cuda():
        model = fake_executor(config, torch.bfloat16, CONTEXT)._model
    norms = [m for m in model.modules() if isinstance(m, RMSNorm | LayerNorm)]
    assert {p.dtype for norm in norms for p in norm.parameters()} == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16
