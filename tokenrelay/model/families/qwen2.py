"""Qwen 2 and 2.5, and Qwen 1.5 and 2 with experts: Llama with a bias on q, k and v. (Yang et al. 2024)"""

from __future__ import annotations

from dataclasses import replace

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families import experts, llama
from tokenrelay.model.families.family import Config, stated
from tokenrelay.model.families.layer_types import Windows, read_windows

RULES = llama.RULES + experts.RULES


def read(config: Config) -> ModelConfig:
    """Layers from ``max_window_layers`` on have the window, if there is one."""
    full = stated(config, max_position_embeddings=32_768) | {"mlp_bias": False}
    return replace(
        llama.read(full), attention_bias=True, output_bias=False, **windows(full, from_layer=_max_window_layers(full))
    )


def read_moe(config: Config) -> ModelConfig:
    """Its experts are narrow, and one more sees every token."""
    full = stated(
        config,
        max_position_embeddings=32_768,
        num_experts=60,
        num_experts_per_tok=4,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
    ) | {"mlp_bias": False}
    if full.get("layer_types") is None:
        first = _max_window_layers(full)
        full["layer_types"] = [_moe_type(layer, first) for layer in range(full["num_hidden_layers"])]
    mixture = experts.read_experts(
        full, full["moe_intermediate_size"], normalize_weights=full.get("norm_topk_prob", False)
    )
    shared = replace(mixture, shared_intermediate_size=full["shared_expert_intermediate_size"], shared_gate=True)
    return replace(
        llama.read(full),
        attention_bias=full.get("qkv_bias", True),
        output_bias=False,
        experts=shared,
        dense_layers=experts.dense_layers(full),
        **windows(full),
    )


def windows(config: Config, from_layer: int = 0) -> Windows:
    """Qwen's files state a window that they do not use."""
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    return read_windows(dict(config) | {"sliding_window": window}, lambda layer: layer >= from_layer)


def _max_window_layers(config: Config) -> int:
    layers: int = config.get("max_window_layers", 28)
    return layers


def _moe_type(layer: int, max_window_layers: int) -> str:
    return "sliding_attention" if layer % 2 == 0 and layer < max_window_layers else "full_attention"
