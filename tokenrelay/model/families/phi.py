"""Phi 1, 1.5 and 2: attention beside MLP behind one layer norm, part of each head rotated. (Li et al. 2023)"""

from __future__ import annotations

from dataclasses import replace

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families import llama
from tokenrelay.model.families.family import Config, Rule, refuse, stated

RULES = (
    *llama.EMBEDDINGS,
    *llama.ATTENTION,
    Rule(llama.LAYER + r"input_layernorm\.(weight|bias)", r"layers.\1.attention_norm.\2"),
    Rule(llama.LAYER + r"self_attn\.dense\.(weight|bias)", r"layers.\1.attention.o_proj.\2"),
    Rule(llama.LAYER + r"mlp\.fc1\.(weight|bias)", r"layers.\1.mlp.up_proj.\2"),
    Rule(llama.LAYER + r"mlp\.fc2\.(weight|bias)", r"layers.\1.mlp.down_proj.\2"),
    Rule(r"model\.final_layernorm\.(weight|bias)", r"norm.\1"),
)


def read(config: Config) -> ModelConfig:
    """A bias everywhere, the head's included."""
    refuse(config, "qk_layernorm")
    full = stated(config, partial_rotary_factor=0.5, hidden_act="gelu_new", layer_norm_eps=1e-5)
    return replace(
        llama.read(full | {"attention_bias": True, "mlp_bias": True}, rotates_parts=True),
        norm="layer",
        norm_eps=full["layer_norm_eps"],
        gated_mlp=False,
        parallel_residual=True,
        shared_norm=True,
        lm_head_bias=True,
    )
