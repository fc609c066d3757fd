"""EXAONE 4: norms behind attention and MLP and on each head; only layers with a window rotate. (LG AI Research 2025)"""

from __future__ import annotations

from dataclasses import replace

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families import llama, olmo
from tokenrelay.model.families.family import Config, stated
from tokenrelay.model.families.layer_types import read_windows

RULES = olmo.OLMO2_RULES


def read(config: Config) -> ModelConfig:
    """Without a window (the 1.2B), all layers rotate."""
    full = stated(config, rms_norm_eps=1e-5, sliding_window=4096, sliding_window_pattern=4)
    period = full["sliding_window_pattern"]
    if isinstance(period, str):  # "LLLG": local three times, then global
        period = len(period)
    windows = read_windows(full, lambda layer: (layer + 1) % period != 0)
    return replace(
        llama.read(full | {"attention_bias": False, "mlp_bias": False}),
        norm_placement="post",
        qk_norm="head",
        unrotated_layers=windows["full_attention_layers"],
        **windows,
    )
