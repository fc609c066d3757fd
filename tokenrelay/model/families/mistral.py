"""Mistral, Ministral, and Meta's CWM: Llama with windows. (Jiang et al. 2023)"""

from __future__ import annotations

from dataclasses import replace

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families import llama
from tokenrelay.model.families.family import Config, stated
from tokenrelay.model.families.layer_types import read_windows

RULES = llama.RULES


def read(config: Config) -> ModelConfig:
    """The window is every layer's."""
    full = stated(config, num_key_value_heads=8, max_position_embeddings=131_072, sliding_window=4096)
    return _read(full | {"layer_types": None})


def read_ministral(config: Config) -> ModelConfig:
    """Each layer has its type."""
    return _read(stated(config, num_key_value_heads=8, max_position_embeddings=131_072, sliding_window=4096))


def read_cwm(config: Config) -> ModelConfig:
    """Every fourth layer sees all, from the first on; its scaling is Llama 3's."""
    full = stated(config, head_dim=128, num_key_value_heads=8, rope_theta=1e6, rms_norm_eps=1e-5, sliding_window=8192)
    return replace(llama.read(full | {"attention_bias": False}), **read_windows(full, lambda layer: layer % 4 != 0))


def _read(config: Config) -> ModelConfig:
    plain = {"attention_bias": False, "mlp_bias": False}
    return replace(llama.read(dict(config) | plain), **read_windows(config))
