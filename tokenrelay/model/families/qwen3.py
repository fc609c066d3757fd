"""Qwen 3, dense and with experts: Llama with norms on the heads' queries and keys. (Yang et al. 2025)"""

from __future__ import annotations

from dataclasses import replace

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families import experts, llama, qwen2
from tokenrelay.model.families.family import Config, stated

RULES = llama.RULES + llama.QK_NORM + experts.RULES


def read(config: Config) -> ModelConfig:
    """Windows as in Qwen 2."""
    full = stated(config, head_dim=128, max_position_embeddings=32_768) | {"mlp_bias": False}
    windows = qwen2.windows(full, from_layer=full.get("max_window_layers", 28))
    return replace(llama.read(full), qk_norm="head", **windows)


def read_moe(config: Config) -> ModelConfig:
    """A window, if it is used, is every layer's."""
    full = stated(
        config,
        max_position_embeddings=32_768,
        num_key_value_heads=4,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    ) | {"mlp_bias": False, "layer_types": None}
    if "num_local_experts" not in full:
        full = stated(full, num_experts=128)
    normalized = full.get("norm_topk_prob", False)
    mixture = experts.read_experts(full, full["moe_intermediate_size"], normalize_weights=normalized)
    return replace(
        llama.read(full),
        qk_norm="head",
        experts=mixture,
        dense_layers=experts.dense_layers(full),
        **qwen2.windows(full),
    )
