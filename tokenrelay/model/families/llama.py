"""Llama 1 to 3, SmolLM2, Mistral: the network whose switches are ``ModelConfig``'s defaults. (Touvron et al. 2023)"""

from __future__ import annotations

from dataclasses import replace

from tokenrelay.model.config import ModelConfig, UnsupportedModelError
from tokenrelay.model.families.family import Config, Rule, activation, token_ids
from tokenrelay.model.families.rope_parameters import max_position_embeddings, read_rope_scaling, rope_parameters

RULES = (
    Rule(r"model\.embed_tokens\.(weight)", r"embed_tokens.\1"),
    Rule(r"model\.layers\.(\d+)\.input_layernorm\.(weight)", r"layers.\1.attention_norm.\2"),
    Rule(r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", r"layers.\1.attention.qkv_proj.\3", r"\2"),
    Rule(r"model\.layers\.(\d+)\.self_attn\.o_proj\.(weight|bias)", r"layers.\1.attention.o_proj.\2"),
    Rule(r"model\.layers\.(\d+)\.post_attention_layernorm\.(weight)", r"layers.\1.mlp_norm.\2"),
    Rule(r"model\.layers\.(\d+)\.mlp\.(gate|up)_proj\.(weight|bias)", r"layers.\1.mlp.up_proj.\3", r"\2"),
    Rule(r"model\.layers\.(\d+)\.mlp\.down_proj\.(weight|bias)", r"layers.\1.mlp.down_proj.\2"),
    Rule(r"model\.norm\.(weight)", r"norm.\1"),
    Rule(r"lm_head\.(weight)", r"lm_head.\1"),
    Rule(r".*\.rotary_emb\.inv_freq", ""),
)


def read(config: Config) -> ModelConfig:
    """Llama's own; others begin with it."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = rope_parameters(config, head_dim)
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
        attention_bias=config.get("attention_bias", False),
        output_bias=config.get("attention_bias", False),
        mlp_bias=config.get("mlp_bias", False),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        eos_token_ids=token_ids(config.get("eos_token_id")),
    )


def read_mistral(config: Config) -> ModelConfig:
    """Llama's network and tensors, with a window; what the file leaves out has transformers' values for Mistral."""
    stated = {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096} | dict(config)
    window = stated["sliding_window"] or 0
    if type(window) is not int or window < 0:
        raise UnsupportedModelError(f"sliding_window must be null or a number of tokens, not {window!r}")
    return replace(read(stated), sliding_window=window)
