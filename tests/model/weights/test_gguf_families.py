"""Every architecture that llama.cpp can write: from transformers through a GGUF file to the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.families.networks import tiny
from tests.model.families.running import logits
from tests.model.weights.gguf_writer import write_gguf
from tokenrelay.model.transformer.loading import load_transformer
from tokenrelay.model.weights.gguf.checkpoint import GGUFCheckpoint

# What the format does not hold is as llama.cpp has it for every model of the architecture: Gemma's scale and windows,
# SmolLM3's layers without positions, no window for Mistral and StarCoder 2, experts in every layer.
_SIX_LAYERS = {"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
_EXPERTS_EVERYWHERE: dict[str, Any] = {"mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": True}
_AS_THEY_ARE = (
    *("gpt2", "llama", "llama, tied", "llama, biased", "llama, wide heads", "mistral, no window", "mixtral"),
    *("gpt_neox", "gpt_neox, sequential", "gpt_neox, no bias", "phi", "phi, grouped"),
    *("falcon, 7b", "falcon, 40b", "falcon, one norm", "stablelm", "stablelm, biased", "stablelm, parallel"),
    *("phi3", "phi3, longrope", "phi3, part of a head", "qwen2", "qwen3", "qwen3, tied"),
    *(
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "gpt_oss",
        "granite",
        "granite, tied and biased",
        "granitemoe",
        "granitemoeshared",
    ),
    *("cohere", "nemotron", "arcee", "seed_oss", "ernie4_5", "gemma"),
)
CHANGES: dict[str, dict[str, Any]] = {
    **{name: {} for name in _AS_THEY_ARE},
    "starcoder2": {"sliding_window": None},
    "starcoder2, no bias": {"sliding_window": None},
    "qwen2_moe": {"mlp_only_layers": []},
    "qwen3_moe": _EXPERTS_EVERYWHERE,
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "layer_types": None},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": _SIX_LAYERS | {"query_pre_attn_scalar": 32},
    "gemma3_text, stretched": _SIX_LAYERS | {"query_pre_attn_scalar": 32, "final_logit_softcapping": None},
}


@torch.inference_mode()
@pytest.mark.parametrize("name", CHANGES)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    network = tiny(name, **CHANGES[name])
    checkpoint = GGUFCheckpoint(write_gguf(network, tmp_path / "tiny.gguf"))
    config, tensors = checkpoint.config(), checkpoint.tensors()
    ours = load_transformer(
        config, tensors, checkpoint.rules, max_model_len=128, dtype=torch.float32, device=torch.device("cpu")
    )
    ids = torch.randint(3, 128, (80,), generator=torch.Generator().manual_seed(1))
    expected = network(ids.unsqueeze(0)).logits[0]
    looser = config.experts or config.attention_softcap or config.logits_softcap
    assert (logits(config, ours, ids, prefilled=70) - expected).abs().max() <= (1e-3 if looser else 1e-4)
