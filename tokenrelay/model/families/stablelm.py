"""StableLM 2 and 3B: Llama with layer norms, and a part of each head rotated. (Bellagente et al. 2024)"""

from __future__ import annotations

from dataclasses import replace

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families import llama
from tokenrelay.model.families.family import Config, refuse, stated

RULES = llama.RULES


def read(config: Config) -> ModelConfig:
    """Attention and MLP stand one after the other, or side by side behind one norm."""
    refuse(config, "qk_layernorm")  # StableLM 2 12B: a layer norm with weights of its own for every head
    full = stated(config, partial_rotary_factor=0.25, layer_norm_eps=1e-5, max_position_embeddings=4096)
    parallel = full.get("use_parallel_residual", False)
    return replace(
        llama.read(full | {"attention_bias": full.get("use_qkv_bias", False), "mlp_bias": False}, rotates_parts=True),
        norm="layer",
        norm_eps=full["layer_norm_eps"],
        output_bias=False,
        parallel_residual=parallel,
        shared_norm=parallel,
    )
