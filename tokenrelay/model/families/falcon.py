"""Falcon: 7B has one key and value for all heads, 40B and 11B some; attention beside MLP. (Almazrouei et al. 2023)"""

from __future__ import annotations

from dataclasses import replace

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families import llama
from tokenrelay.model.families.family import Config, Rule, refuse, stated

_LAYER = r"transformer\.h\.(\d+)\."

RULES = (
    Rule(r"transformer\.word_embeddings\.(weight)", r"embed_tokens.\1"),
    Rule(_LAYER + r"(?:input_layernorm|ln_attn)\.(weight|bias)", r"layers.\1.attention_norm.\2"),
    Rule(_LAYER + r"(?:post_attention_layernorm|ln_mlp)\.(weight|bias)", r"layers.\1.mlp_norm.\2"),
    Rule(
        _LAYER + r"self_attention\.query_key_value\.(weight|bias)",
        r"layers.\1.attention.qkv_proj.\2",
        layout="grouped_qkv",
    ),
    Rule(_LAYER + r"self_attention\.dense\.(weight|bias)", r"layers.\1.attention.o_proj.\2"),
    Rule(_LAYER + r"mlp\.dense_h_to_4h\.(weight|bias)", r"layers.\1.mlp.up_proj.\2"),
    Rule(_LAYER + r"mlp\.dense_4h_to_h\.(weight|bias)", r"layers.\1.mlp.down_proj.\2"),
    Rule(r"transformer\.ln_f\.(weight|bias)", r"norm.\1"),
    Rule(r"lm_head\.(weight)", r"lm_head.\1"),
    Rule(_LAYER + r"self_attention\.rotary_emb\.inv_freq", ""),
)


def read(config: Config) -> ModelConfig:
    """Three layouts: new decoder (one norm or two), old one in parallel, old one in sequence."""
    refuse(config, "alibi", "apply_residual_connection_post_layernorm")
    new, bias = config.get("new_decoder_architecture", False), config.get("bias", False)
    parallel = new or config.get("parallel_attn", True)
    norms = config.get("num_ln_in_parallel_attn") or (2 if new else 1)
    derived = {
        "num_key_value_heads": _num_kv_heads(config, new),
        "intermediate_size": config.get("ffn_hidden_size") or 4 * config["hidden_size"],
        "hidden_act": config.get("activation", "gelu"),
        "attention_bias": bias,
        "mlp_bias": bias,
    }
    return replace(
        llama.read(stated(config, tie_word_embeddings=True) | derived),
        norm="layer",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        gated_mlp=False,
        parallel_residual=parallel,
        shared_norm=parallel and (norms == 1 or not new),
    )


def _num_kv_heads(config: Config, new: bool) -> int | None:
    """None: as many as heads."""
    if new or not config.get("multi_query", True):
        return config.get("num_kv_heads")
    return 1
