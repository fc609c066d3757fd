"""GPT-Neo: GPT-2 with windows in every other layer, and logits of attention that are not scaled. (Black et al. 2021)"""

from __future__ import annotations

from dataclasses import replace

from tokenrelay.model.config import ModelConfig, UnsupportedModelError
from tokenrelay.model.families import gpt2
from tokenrelay.model.families.family import Config, Rule, stated

_LAYER = gpt2.LAYER

RULES = (
    *gpt2.EMBEDDINGS,
    *gpt2.NORMS,
    Rule(_LAYER + r"\.attn\.attention\.([qkv])_proj\.(weight)", r"layers.\1.attention.qkv_proj.\3", r"\2"),
    Rule(_LAYER + r"\.attn\.attention\.out_proj\.(weight|bias)", r"layers.\1.attention.o_proj.\2"),
    Rule(_LAYER + r"\.mlp\.c_fc\.(weight|bias)", r"layers.\1.mlp.up_proj.\2"),
    Rule(_LAYER + r"\.mlp\.c_proj\.(weight|bias)", r"layers.\1.mlp.down_proj.\2"),
    Rule(_LAYER + r"\.attn\.attention\.(?:masked_)?bias", ""),
)


def read(config: Config) -> ModelConfig:
    """GPT-2's network under other keys."""
    full = stated(config, attention_types=[[["global", "local"], 12]], window_size=256)
    renamed = {
        "n_embd": full["hidden_size"],
        "n_head": full["num_heads"],
        "n_layer": full["num_layers"],
        "n_positions": full["max_position_embeddings"],
        "n_inner": full.get("intermediate_size"),
    }
    kinds = [kind for period, count in full["attention_types"] for kind in period * count]
    if len(kinds) != full["num_layers"] or set(kinds) - {"global", "local"}:
        raise UnsupportedModelError(f"gpt_neo with attention_types={full['attention_types']!r} is not supported")
    return replace(
        gpt2.read(full | renamed),
        attention_bias=False,
        attention_scale=1.0,
        sliding_window=full["window_size"],
        full_attention_layers=frozenset(layer for layer, kind in enumerate(kinds) if kind == "global"),
    )
