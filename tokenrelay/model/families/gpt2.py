"""GPT-2 (Radford et al. 2019) and GPT-1: learned positions, layer norms, biases everywhere, one matrix for q, k, v."""

from __future__ import annotations

from dataclasses import replace

from tokenrelay.model.config import ModelConfig, UnsupportedModelError
from tokenrelay.model.families.family import Config, Rule, activation, refuse, token_ids

LAYER = r"(?:transformer\.)?h\.(\d+)"  # published files name the bare network, without the language model's prefix
EMBEDDINGS = (
    Rule(r"(?:transformer\.)?(?:wte|tokens_embed)\.(weight)", r"embed_tokens.\1"),
    Rule(r"(?:transformer\.)?(?:wpe|positions_embed)\.(weight)", r"embed_positions.\1"),
    Rule(r"lm_head\.(weight)", r"lm_head.\1"),
)
NORMS = (
    Rule(LAYER + r"\.ln_1\.(weight|bias)", r"layers.\1.attention_norm.\2"),
    Rule(LAYER + r"\.ln_2\.(weight|bias)", r"layers.\1.mlp_norm.\2"),
    Rule(r"(?:transformer\.)?ln_f\.(weight|bias)", r"norm.\1"),
)
LINEARS = (
    Rule(LAYER + r"\.attn\.c_attn\.(weight|bias)", r"layers.\1.attention.qkv_proj.\2"),
    Rule(LAYER + r"\.attn\.c_proj\.(weight|bias)", r"layers.\1.attention.o_proj.\2"),
    Rule(LAYER + r"\.mlp\.c_fc\.(weight|bias)", r"layers.\1.mlp.up_proj.\2"),
    Rule(LAYER + r"\.mlp\.c_proj\.(weight|bias)", r"layers.\1.mlp.down_proj.\2"),
    Rule(LAYER + r"\.attn\.(?:masked_)?bias", ""),
)
_TRANSPOSED = tuple(  # its matrices are those of Conv1D
    Rule(rule.pattern.replace("weight|bias", "weight"), rule.target, layout="transposed") for rule in LINEARS[:4]
)
RULES = EMBEDDINGS + NORMS + _TRANSPOSED + LINEARS


def read(config: Config) -> ModelConfig:
    """Raises UnsupportedModelError for switches that no published checkpoint of the family needs."""
    refuse(config, "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention")
    if not config.get("scale_attn_weights", True):
        raise UnsupportedModelError(f"{config['model_type']} with scale_attn_weights=false is not supported")
    hidden, heads = config["n_embd"], config["n_head"]
    return ModelConfig(
        architecture=config["model_type"],
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        intermediate_size=config.get("n_inner") or 4 * hidden,
        num_layers=config["n_layer"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=config["n_positions"],
        norm="layer",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        activation=activation(config.get("activation_function", "gelu_new")),
        gated_mlp=False,
        positions="learned",
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        tie_word_embeddings=config.get("tie_word_embeddings", True),
        eos_token_ids=token_ids(config.get("eos_token_id")),
    )


def read_gpt1(config: Config) -> ModelConfig:
    """GPT-1: each sum is normalised, and there is no norm at the end; its gelu is the approximation."""
    name = config.get("afn", "gelu")
    full = dict(config) | {"activation_function": "gelu_new" if name == "gelu" else name, "n_inner": None}
    return replace(read(full), norm_placement="after_sum", final_norm=False)
