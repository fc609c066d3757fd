"""Phi 3, 3.5 and 4: Llama with q, k and v in one matrix, gate and up in another. (Abdin et al. 2024)"""

from __future__ import annotations

from dataclasses import replace

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families import llama
from tokenrelay.model.families.family import Config, Rule, stated
from tokenrelay.model.families.layer_types import read_windows

RULES = (
    *llama.RULES,
    Rule(llama.LAYER + r"self_attn\.qkv_proj\.(weight)", r"layers.\1.attention.qkv_proj.\2"),
    *llama.FUSED_MLP,
)


def read(config: Config) -> ModelConfig:
    """A window, if the file states one, is every layer's."""
    full = stated(config, max_position_embeddings=4096, original_max_position_embeddings=4096, rms_norm_eps=1e-5) | {
        "attention_bias": False,
        "mlp_bias": False,
        "layer_types": None,
    }
    scaling = full.get("rope_scaling") or full.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "yarn":  # another of longrope's first names, in this family alone
        full |= {"rope_scaling": dict(scaling) | {"rope_type": "longrope"}}
    return replace(llama.read(full, rotates_parts=True), **read_windows(full))
