"""SmolLM3: Llama, but every fourth layer does not rotate. (Bakouch et al. 2025; NoPE: Yang et al. 2025)"""

from __future__ import annotations

from dataclasses import replace

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families import llama
from tokenrelay.model.families.family import Config, stated
from tokenrelay.model.families.layer_types import read_windows

RULES = llama.RULES


def read(config: Config) -> ModelConfig:
    """A window, if it is used, is that of the layers that do not rotate."""
    full = stated(
        config, num_key_value_heads=4, max_position_embeddings=32_768, rope_theta=2e6, tie_word_embeddings=True
    )
    interval, layers = full.get("no_rope_layer_interval", 4), full["num_hidden_layers"]
    rotated = full.get("no_rope_layers") or [(layer + 1) % interval for layer in range(layers)]
    unrotated = frozenset(layer for layer in range(layers) if not rotated[layer])
    used = full | ({} if full.get("use_sliding_window") else {"sliding_window": None})
    return replace(llama.read(full), unrotated_layers=unrotated, **read_windows(used, lambda layer: layer in unrotated))
