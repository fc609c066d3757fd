"""GPT-OSS: experts, windows in every other layer, and a learned sink in every head's softmax. (OpenAI 2025)"""

from __future__ import annotations

from dataclasses import replace

from tokenrelay.model.config import ModelConfig, UnsupportedModelError
from tokenrelay.model.families import experts, llama
from tokenrelay.model.families.family import EXPERT, Config, Rule, stated
from tokenrelay.model.families.layer_types import read_windows

_MLP = llama.LAYER + r"mlp\."
_EXPERT = r"layers.\1.mlp.experts." + EXPERT

RULES = (
    *llama.EMBEDDINGS,
    *llama.FINAL_NORM,
    *llama.NORMS,
    *llama.ATTENTION,
    Rule(llama.LAYER + r"self_attn\.sinks", r"layers.\1.attention.sinks"),
    Rule(_MLP + r"router\.(weight|bias)", r"layers.\1.mlp.router.\2"),
    Rule(_MLP + r"experts\.gate_up_proj", _EXPERT + ".up_proj.weight", layout="interleaved_gate_up"),
    Rule(_MLP + r"experts\.gate_up_proj_bias", _EXPERT + ".up_proj.bias", layout="interleaved_gate_up"),
    Rule(_MLP + r"experts\.down_proj", _EXPERT + ".down_proj.weight", layout="transposed"),
    Rule(_MLP + r"experts\.down_proj_bias", _EXPERT + ".down_proj.bias"),
)
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read(config: Config) -> ModelConfig:
    """A bias everywhere but on the head; its activation's two constants are built in."""
    if (config.get("swiglu_alpha", 1.702), config.get("swiglu_limit", 7.0)) != (1.702, 7.0):
        raise UnsupportedModelError(
            "gpt_oss with other values than swiglu_alpha=1.702, swiglu_limit=7 is not supported"
        )
    full = stated(
        config,
        head_dim=64,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        rope_theta=150_000.0,
        attention_bias=True,
        sliding_window=128,
        num_experts_per_tok=4,
    )
    if not (full.get("rope_scaling") or full.get("rope_parameters")):
        full |= {"rope_parameters": _YARN}
    mixture = replace(experts.read_experts(full, full["intermediate_size"]), router_bias=True)
    return replace(
        llama.read(full | {"hidden_act": "silu", "mlp_bias": True}),
        activation="swiglu_oai",
        learned_sinks=True,
        experts=mixture,
        **read_windows(full, lambda layer: layer % 2 == 0),
    )
