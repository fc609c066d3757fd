"""GLM 4 and 4-0414, Helium, ERNIE 4.5: Llama whose rotation turns neighbouring elements. (GLM Team 2024)"""

from __future__ import annotations

from dataclasses import replace

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families import llama
from tokenrelay.model.families.family import Config, Rule, stated

_ATTENTION = llama.EMBEDDINGS + llama.FINAL_NORM + llama.PAIRED_ATTENTION
RULES = _ATTENTION + llama.NORMS + llama.FUSED_MLP + llama.MLP
GLM4_RULES = (
    *_ATTENTION,
    Rule(llama.LAYER + r"input_layernorm\.(weight)", r"layers.\1.attention_norm.\2"),
    Rule(llama.LAYER + r"post_self_attn_layernorm\.(weight)", r"layers.\1.attention_post_norm.\2"),
    Rule(llama.LAYER + r"post_attention_layernorm\.(weight)", r"layers.\1.mlp_norm.\2"),
    Rule(llama.LAYER + r"post_mlp_layernorm\.(weight)", r"layers.\1.mlp_post_norm.\2"),
    *llama.FUSED_MLP,
    *llama.MLP,
)


def read(config: Config) -> ModelConfig:
    """Half of each head is rotated."""
    full = stated(
        config,
        head_dim=128,
        num_key_value_heads=2,
        partial_rotary_factor=0.5,
        max_position_embeddings=131_072,
        rms_norm_eps=0.00000015625,
        attention_bias=True,
        eos_token_id=[151329, 151336, 151338],
    ) | {"mlp_bias": False}
    return replace(llama.read(full, rotates_parts=True), output_bias=False)


def read_glm4(config: Config) -> ModelConfig:
    """GLM-4-0414: norms on both sides."""
    return replace(read(config), norm_placement="sandwich")


def read_helium(config: Config) -> ModelConfig:
    """Kyutai's."""
    full = stated(config, head_dim=128, rope_theta=100_000.0, rms_norm_eps=1e-8, max_position_embeddings=4096)
    return replace(llama.read(full), output_bias=False)


def read_ernie(config: Config) -> ModelConfig:
    """ERNIE 4.5 without experts: one switch for the bias of all."""
    full = stated(
        config,
        head_dim=128,
        num_key_value_heads=2,
        rope_theta=500_000.0,
        rms_norm_eps=1e-5,
        max_position_embeddings=131_072,
        tie_word_embeddings=True,
    )
    bias = bool(full.get("use_bias", False))
    return llama.read(full | {"attention_bias": bias, "mlp_bias": bias})
