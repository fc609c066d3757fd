"""Mixtral: Mistral with experts, and without a window. (Jiang et al. 2024)"""

from __future__ import annotations

from dataclasses import replace

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families import experts, llama
from tokenrelay.model.families.family import Config, stated
from tokenrelay.model.families.layer_types import read_windows

RULES = llama.EMBEDDINGS + llama.FINAL_NORM + llama.NORMS + llama.ATTENTION + experts.RULES


def read(config: Config) -> ModelConfig:
    """A window, if the file states one, is every layer's."""
    full = stated(
        config,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        num_local_experts=8,
        num_experts_per_tok=2,
    ) | {"attention_bias": False, "mlp_bias": False, "layer_types": None}
    mixture = experts.read_experts(full, full["intermediate_size"])
    return replace(llama.read(full), experts=mixture, **read_windows(full))
