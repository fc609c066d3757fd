"""OPT and Galactica: GPT-3 as Meta rebuilt it; positions are counted from 2. (Zhang et al. 2022)"""

from __future__ import annotations

from tokenrelay.model.config import ModelConfig, UnsupportedModelError
from tokenrelay.model.families.family import Config, Rule, activation, token_ids

_DECODER = r"(?:model\.)?decoder\."
_LAYER = _DECODER + r"layers\.(\d+)\."

RULES = (
    Rule(_DECODER + r"embed_tokens\.(weight)", r"embed_tokens.\1"),
    Rule(_DECODER + r"embed_positions\.(weight)", r"embed_positions.\1", layout="from_third_row"),
    Rule(_LAYER + r"self_attn_layer_norm\.(weight|bias)", r"layers.\1.attention_norm.\2"),
    Rule(_LAYER + r"self_attn\.([qkv])_proj\.(weight|bias)", r"layers.\1.attention.qkv_proj.\3", r"\2"),
    Rule(_LAYER + r"self_attn\.out_proj\.(weight|bias)", r"layers.\1.attention.o_proj.\2"),
    Rule(_LAYER + r"final_layer_norm\.(weight|bias)", r"layers.\1.mlp_norm.\2"),
    Rule(_LAYER + r"fc1\.(weight|bias)", r"layers.\1.mlp.up_proj.\2"),
    Rule(_LAYER + r"fc2\.(weight|bias)", r"layers.\1.mlp.down_proj.\2"),
    Rule(_DECODER + r"final_layer_norm\.(weight|bias)", r"norm.\1"),
    Rule(r"lm_head\.(weight)", r"lm_head.\1"),
)


def read(config: Config) -> ModelConfig:
    """Raises UnsupportedModelError: embeddings that are narrower than the network (OPT 350m)."""
    hidden, heads, bias = config["hidden_size"], config["num_attention_heads"], config.get("enable_bias", True)
    if config.get("word_embed_proj_dim") not in (None, hidden):
        raise UnsupportedModelError(
            f"opt with word_embed_proj_dim={config['word_embed_proj_dim']!r}, not hidden_size ({hidden}), is not built"
        )
    affine, first = config.get("layer_norm_elementwise_affine", True), config.get("do_layer_norm_before", True)
    return ModelConfig(
        architecture="opt",
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        intermediate_size=config["ffn_dim"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        norm="layer",
        norm_eps=1e-5,
        norm_weight=affine,
        norm_bias=affine,
        norm_placement="pre" if first else "after_sum",
        final_norm=first and not config.get("_remove_final_layer_norm", False),
        activation=activation(config.get("activation_function", "relu")),
        gated_mlp=False,
        positions="learned",
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=config.get("tie_word_embeddings", True),
        eos_token_ids=token_ids(config.get("eos_token_id", 2)),
    )
