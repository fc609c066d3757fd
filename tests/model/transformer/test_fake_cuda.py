"""The forward pass on a GPU that is not there: shapes, types, devices and signatures, but no numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tokenrelay.model.config import Experts, ModelConfig
from tokenrelay.model.transformer.attention import AttentionMetadata
from tokenrelay.model.transformer.kv_cache import allocate_kv_cache
from tokenrelay.model.transformer.loading import materialise, typed

LLAMA = ModelConfig(
    architecture="llama",
    vocab_size=64,
    hidden_size=128,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_position_embeddings=64,
    norm="rms",
    norm_eps=1e-5,
    activation="silu",
    gated_mlp=True,
    positions="rotary",
)
GPT2 = dataclasses.replace(
    LLAMA,
    architecture="gpt2",
    num_kv_heads=4,
    norm="layer",
    activation="gelu_tanh",
    gated_mlp=False,
    positions="learned",
    attention_bias=True,
)
WINDOWED = dataclasses.replace(LLAMA, sliding_window=9)
MIXTRAL = dataclasses.replace(LLAMA, experts=Experts(num_experts=4, num_experts_per_token=2, intermediate_size=32))


@pytest.mark.parametrize("config", [LLAMA, GPT2, WINDOWED, MIXTRAL], ids=["llama", "gpt2", "sliding window", "experts"])
@torch.inference_mode()
def test_a_mixed_step_of_a_prefill_chunk_and_a_decode(config: ModelConfig) -> None:
    cuda, bf16 = torch.device("cuda"), torch.bfloat16
    model = typed(config, 64, 0, bf16, cuda)
    with FakeTensorMode():
        materialise(model, cuda)
        if config.positions == "rotary":
            model.rotary = torch.empty(64, config.head_dim, device=cuda)
        cache = allocate_kv_cache(config, 8, 16, bf16, cuda)
        metadata = AttentionMetadata(
            slot_mapping=torch.empty(21, dtype=torch.int64, device=cuda),
            block_tables=torch.empty(2, 3, dtype=torch.int32, device=cuda),
            query_start_loc=torch.empty(3, dtype=torch.int32, device=cuda),
            seq_lens=torch.empty(2, dtype=torch.int32, device=cuda),
        )
        ids = torch.empty(21, dtype=torch.int64, device=cuda)
        hidden = model(ids, ids, cache, metadata)
        logits = model.compute_logits(hidden)
    assert (tuple(hidden.shape), hidden.dtype, hidden.device.type) == ((21, 128), bf16, "cuda")
    assert (tuple(logits.shape), logits.dtype, logits.device.type) == ((21, 64), torch.float32, "cuda")
