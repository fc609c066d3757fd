"""The decoder of "Attention Is All You Need", to learn from: no published checkpoint has these names. (Vaswani 2017)

Sinusoidal positions are added to embeddings times sqrt(width), every sum is normalised, and the MLP is a ReLU between
two matrices. ``config.json`` has ``vocab_size``, ``hidden_size``, ``intermediate_size``, ``num_hidden_layers``,
``num_attention_heads`` and ``max_position_embeddings``; it may have ``layer_norm_eps``, ``tie_word_embeddings`` and
``eos_token_id``. Tensors are named as in ``tests/model/families/vanilla.py``, the same network in seventy lines.
"""

from __future__ import annotations

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families.family import Config, Rule, token_ids

_LAYER = r"layers\.(\d+)\."

RULES = (
    Rule(r"(embed_tokens|lm_head)\.(weight)", r"\1.\2"),
    Rule(_LAYER + r"([qkv])_proj\.(weight)", r"layers.\1.attention.qkv_proj.\3", r"\2"),
    Rule(_LAYER + r"(o_proj)\.(weight)", r"layers.\1.attention.\2.\3"),
    Rule(_LAYER + r"(up_proj|down_proj)\.(weight|bias)", r"layers.\1.mlp.\2.\3"),
    Rule(_LAYER + r"(attention_norm|mlp_norm)\.(weight|bias)", r"layers.\1.\2.\3"),
)


def read(config: Config) -> ModelConfig:
    """As in the paper, a bias in the MLP alone, and the head tied to the embeddings."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    return ModelConfig(
        architecture=config["model_type"],
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=config["max_position_embeddings"],
        norm="layer",
        norm_eps=config.get("layer_norm_eps", 1e-5),
        norm_placement="after_sum",
        final_norm=False,
        activation="relu",
        gated_mlp=False,
        positions="sinusoidal",
        embedding_scale=hidden**0.5,
        mlp_bias=True,
        tie_word_embeddings=config.get("tie_word_embeddings", True),
        eos_token_ids=token_ids(config.get("eos_token_id")),
    )
