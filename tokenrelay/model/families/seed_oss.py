"""Seed-OSS: Llama with a bias on q, k and v. (ByteDance 2025)"""

from __future__ import annotations

from dataclasses import replace

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families import llama
from tokenrelay.model.families.family import Config, stated

RULES = llama.RULES


def read(config: Config) -> ModelConfig:
    """The bias behind attention has a switch of its own."""
    full = stated(config, head_dim=128, num_key_value_heads=8, max_position_embeddings=524_288, attention_bias=True)
    return replace(llama.read(full), output_bias=full.get("attention_out_bias", False))
