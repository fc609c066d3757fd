"""Starcoder 2, Nemotron, Arcee: Llama with an MLP that has no gate. (Lozhkov et al. 2024; Parmar et al. 2024)"""

from __future__ import annotations

from dataclasses import replace

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families import llama
from tokenrelay.model.families.family import Config, Rule, stated
from tokenrelay.model.families.layer_types import read_windows

_UP = Rule(llama.LAYER + r"mlp\.(?:up_proj|c_fc)\.(weight|bias)", r"layers.\1.mlp.up_proj.\2")
_DOWN = Rule(llama.LAYER + r"mlp\.(?:down_proj|c_proj)\.(weight|bias)", r"layers.\1.mlp.down_proj.\2")
RULES = (*llama.EMBEDDINGS, *llama.FINAL_NORM, *llama.NORMS, *llama.ATTENTION, _UP, _DOWN)


def _less_one(rule: Rule) -> Rule:
    return rule._replace(pattern=rule.pattern.replace("weight|bias", "weight"), layout="plus_one")


NEMOTRON_RULES = (*(_less_one(rule) for rule in llama.FINAL_NORM + llama.NORMS), *RULES)


def read_starcoder2(config: Config) -> ModelConfig:
    """Layer norms, one switch for the bias of all, and a window of every layer."""
    full = stated(
        config, num_key_value_heads=2, hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True, norm_epsilon=1e-5
    )
    bias = full.get("use_bias", True)
    return replace(
        llama.read(full | {"attention_bias": bias, "mlp_bias": bias}),
        norm="layer",
        norm_eps=full["norm_epsilon"],
        gated_mlp=False,
        **read_windows(full | {"layer_types": None}),
    )


def read_nemotron(config: Config) -> ModelConfig:
    """Layer norms whose weights are stored less 1, squared ReLU, half of each head rotated."""
    full = stated(config, hidden_act="relu2", partial_rotary_factor=0.5, norm_eps=1e-5, max_position_embeddings=4096)
    return replace(llama.read(full, rotates_parts=True), norm="layer", norm_eps=full["norm_eps"], gated_mlp=False)


def read_arcee(config: Config) -> ModelConfig:
    """AFM: squared ReLU."""
    full = stated(config, hidden_act="relu2", rms_norm_eps=1e-5, max_position_embeddings=4096)
    return replace(llama.read(full), gated_mlp=False)
