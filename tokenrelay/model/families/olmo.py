"""OLMo 1, 2 and 3, OLMoE: open to the last detail. (Groeneveld et al. 2024; OLMo Team 2025)"""

from __future__ import annotations

from dataclasses import replace

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families import experts, llama
from tokenrelay.model.families.family import Config, Rule, refuse, stated
from tokenrelay.model.families.layer_types import read_windows
from tokenrelay.model.families.rope_parameters import by_layer_type

RULES = llama.RULES
OLMO2_RULES = (
    *llama.EMBEDDINGS,
    *llama.FINAL_NORM,
    Rule(llama.LAYER + r"post_attention_layernorm\.(weight)", r"layers.\1.attention_norm.\2"),
    Rule(llama.LAYER + r"post_feedforward_layernorm\.(weight)", r"layers.\1.mlp_norm.\2"),
    *llama.ATTENTION,
    *llama.QK_NORM,
    *llama.MLP,
)
OLMOE_RULES = llama.RULES + llama.QK_NORM + experts.RULES


def read(config: Config) -> ModelConfig:
    """Layer norms without weights."""
    refuse(config, "clip_qkv")
    network = llama.read(dict(config) | {"mlp_bias": False})
    return replace(network, norm="layer", norm_eps=1e-5, norm_weight=False, norm_bias=False)


def read_olmo2(config: Config) -> ModelConfig:
    """Norms behind attention and MLP, and over all queries and keys at once."""
    full = stated(config, rms_norm_eps=1e-5) | {"mlp_bias": False}
    return replace(llama.read(full), norm_placement="post", qk_norm="whole")


def read_olmo3(config: Config) -> ModelConfig:
    """OLMo 2 with windows in three of four layers, whose positions are never scaled."""
    full = stated(config, sliding_window=4096)
    flat, local_theta = by_layer_type(full, theta=500_000.0, local_theta=full.get("rope_theta", 500_000.0))
    windows = read_windows(full, lambda layer: (layer + 1) % 4 != 0)
    return replace(read_olmo2(flat), local_rope_theta=local_theta, **windows)


def read_olmoe(config: Config) -> ModelConfig:
    """Llama's placement, OLMo 2's queries and keys, and experts."""
    refuse(config, "clip_qkv")
    full = stated(config, rms_norm_eps=1e-5, max_position_embeddings=4096, num_experts=64, num_experts_per_tok=8) | {
        "mlp_bias": False
    }
    normalized = full.get("norm_topk_prob", False)
    mixture = experts.read_experts(full, full["intermediate_size"], normalize_weights=normalized)
    return replace(llama.read(full), qk_norm="whole", experts=mixture)
