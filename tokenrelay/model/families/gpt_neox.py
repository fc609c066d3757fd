"""GPT-NeoX and Pythia: attention and MLP side by side, each behind its own layer norm. (Black et al. 2022)"""

from __future__ import annotations

from dataclasses import replace

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families import llama
from tokenrelay.model.families.family import Config, Rule, stated

_LAYER = r"gpt_neox\.layers\.(\d+)\."

RULES = (
    Rule(r"gpt_neox\.embed_in\.(weight)", r"embed_tokens.\1"),
    Rule(_LAYER + r"input_layernorm\.(weight|bias)", r"layers.\1.attention_norm.\2"),
    Rule(_LAYER + r"post_attention_layernorm\.(weight|bias)", r"layers.\1.mlp_norm.\2"),
    Rule(
        _LAYER + r"attention\.query_key_value\.(weight|bias)", r"layers.\1.attention.qkv_proj.\2", layout="grouped_qkv"
    ),
    Rule(_LAYER + r"attention\.dense\.(weight|bias)", r"layers.\1.attention.o_proj.\2"),
    Rule(_LAYER + r"mlp\.dense_h_to_4h\.(weight|bias)", r"layers.\1.mlp.up_proj.\2"),
    Rule(_LAYER + r"mlp\.dense_4h_to_h\.(weight|bias)", r"layers.\1.mlp.down_proj.\2"),
    Rule(r"gpt_neox\.final_layer_norm\.(weight|bias)", r"norm.\1"),
    Rule(r"embed_out\.(weight)", r"lm_head.\1"),
    Rule(_LAYER + r"attention\.(?:bias|masked_bias|rotary_emb\.inv_freq)", ""),
)


def read(config: Config) -> ModelConfig:
    """A quarter of each head is rotated, unless the file says otherwise, by the names it had before transformers 5."""
    older = {
        "rope_theta": config.get("rotary_emb_base", 10_000.0),
        "partial_rotary_factor": config.get("rotary_pct", 0.25),
    }
    full = stated(config, **older, hidden_act="gelu", layer_norm_eps=1e-5, attention_bias=True)
    return replace(
        llama.read(full | {"num_key_value_heads": None, "mlp_bias": True}, rotates_parts=True),
        norm="layer",
        norm_eps=full["layer_norm_eps"],
        gated_mlp=False,
        parallel_residual=full.get("use_parallel_residual", True),
    )
