"""GPT-J: attention and MLP side by side behind one layer norm, neighbours rotated. (Wang & Komatsuzaki 2021)"""

from __future__ import annotations

from dataclasses import replace

from tokenrelay.model.config import ModelConfig, UnsupportedModelError
from tokenrelay.model.families import gpt2
from tokenrelay.model.families.family import Config, Rule, stated

_LAYER = gpt2.LAYER

RULES = (
    Rule(r"(?:transformer\.)?wte\.(weight)", r"embed_tokens.\1"),
    Rule(_LAYER + r"\.ln_1\.(weight|bias)", r"layers.\1.attention_norm.\2"),
    Rule(_LAYER + r"\.attn\.([qk])_proj\.(weight)", r"layers.\1.attention.qkv_proj.\3", r"\2", "paired_rotary"),
    Rule(_LAYER + r"\.attn\.v_proj\.(weight)", r"layers.\1.attention.qkv_proj.\2", "v"),
    Rule(_LAYER + r"\.attn\.out_proj\.(weight)", r"layers.\1.attention.o_proj.\2"),
    Rule(_LAYER + r"\.mlp\.fc_in\.(weight|bias)", r"layers.\1.mlp.up_proj.\2"),
    Rule(_LAYER + r"\.mlp\.fc_out\.(weight|bias)", r"layers.\1.mlp.down_proj.\2"),
    Rule(r"(?:transformer\.)?ln_f\.(weight|bias)", r"norm.\1"),
    Rule(r"lm_head\.(weight|bias)", r"lm_head.\1"),
    Rule(_LAYER + r"\.attn\.(?:masked_)?bias", ""),
)


def read(config: Config) -> ModelConfig:
    """GPT-2's keys, and ``rotary_dim``, which may not be null here: nothing published has it so."""
    full = stated(config, rotary_dim=64, tie_word_embeddings=False)
    network = gpt2.read(full)
    rotary_dim = full["rotary_dim"]
    if type(rotary_dim) is not int or rotary_dim % 2 or not 0 < rotary_dim <= network.head_dim:
        raise UnsupportedModelError(f"gptj with rotary_dim={rotary_dim!r} is not supported")
    return replace(
        network,
        positions="rotary",
        rotary_dim=rotary_dim,
        attention_bias=False,
        output_bias=False,
        parallel_residual=True,
        shared_norm=True,
        lm_head_bias=True,
    )
