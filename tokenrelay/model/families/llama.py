"""Llama 1 to 3, SmolLM2: the network whose switches are ``ModelConfig``'s defaults. (Touvron et al. 2023)

Most other families are this one with other switches, and take its reader and its tables.
"""

from __future__ import annotations

from tokenrelay.model.config import ModelConfig, UnsupportedModelError
from tokenrelay.model.families.family import Config, Rule, activation, token_ids
from tokenrelay.model.families.rope_parameters import max_position_embeddings, read_rope_scaling, rope_parameters

LAYER = r"model\.layers\.(\d+)\."
EMBEDDINGS = (
    Rule(r"model\.embed_tokens\.(weight)", r"embed_tokens.\1"),
    Rule(r"lm_head\.(weight|bias)", r"lm_head.\1"),
    Rule(r".*\.rotary_emb\.inv_freq", ""),
)
FINAL_NORM = (Rule(r"model\.norm\.(weight|bias)", r"norm.\1"),)
NORMS = (
    Rule(LAYER + r"input_layernorm\.(weight|bias)", r"layers.\1.attention_norm.\2"),
    Rule(LAYER + r"post_attention_layernorm\.(weight|bias)", r"layers.\1.mlp_norm.\2"),
)
ATTENTION = (
    Rule(LAYER + r"self_attn\.([qkv])_proj\.(weight|bias)", r"layers.\1.attention.qkv_proj.\3", r"\2"),
    Rule(LAYER + r"self_attn\.o_proj\.(weight|bias)", r"layers.\1.attention.o_proj.\2"),
)
QK_NORM = (Rule(LAYER + r"self_attn\.([qk])_norm\.(weight)", r"layers.\1.attention.\2_norm.\3"),)
MLP = (
    Rule(LAYER + r"mlp\.(gate|up)_proj\.(weight|bias)", r"layers.\1.mlp.up_proj.\3", r"\2"),
    Rule(LAYER + r"mlp\.down_proj\.(weight|bias)", r"layers.\1.mlp.down_proj.\2"),
)
FUSED_MLP = (Rule(LAYER + r"mlp\.gate_up_proj\.(weight)", r"layers.\1.mlp.up_proj.\2"),)
PAIRED_ATTENTION = (  # the rotation turns neighbouring elements, ours those half a head apart
    Rule(LAYER + r"self_attn\.([qk])_proj\.(weight|bias)", r"layers.\1.attention.qkv_proj.\3", r"\2", "paired_rotary"),
    *ATTENTION,
)
RULES = EMBEDDINGS + FINAL_NORM + NORMS + ATTENTION + MLP


def read(config: Config, *, rotates_parts: bool = False) -> ModelConfig:
    """Llama's own; others begin with it. ``rotates_parts``: the rotation may leave out the end of each head."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = rope_parameters(config, head_dim)
    if rope["rotary_dim"] != head_dim and not rotates_parts:
        raise UnsupportedModelError(
            f"{config['model_type']} with partial_rotary_factor {rope['partial_rotary_factor']!r} is not supported; "
            "only whole heads (1.0) are"
        )
    rope_scaling = read_rope_scaling(rope)
    return ModelConfig(
        architecture=config["model_type"],
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings(rope, rope_scaling),
        norm="rms",
        norm_eps=config.get("rms_norm_eps", 1e-6),
        activation=activation(config.get("hidden_act", "silu")),
        gated_mlp=True,
        positions="rotary",
        rope_theta=rope["rope_theta"],
        rope_scaling=rope_scaling,
        rotary_dim=0 if rope["rotary_dim"] == head_dim else rope["rotary_dim"],
        attention_bias=config.get("attention_bias", False),
        output_bias=config.get("attention_bias", False),
        mlp_bias=config.get("mlp_bias", False),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        eos_token_ids=token_ids(config.get("eos_token_id")),
    )
