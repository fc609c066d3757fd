"""Command R and R7B: attention and MLP side by side behind one layer norm, neighbours rotated. (Cohere 2024)"""

from __future__ import annotations

from dataclasses import replace

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families import llama
from tokenrelay.model.families.family import Config, refuse, stated
from tokenrelay.model.families.layer_types import read_windows

RULES = llama.EMBEDDINGS + llama.FINAL_NORM + llama.NORMS + llama.PAIRED_ATTENTION + llama.MLP


def read(config: Config) -> ModelConfig:
    """Command R; Command R+ normalises each head by weights of its own, which is not built."""
    refuse(config, "use_qk_norm")
    return _read(stated(config, rope_theta=500_000.0))


def read_cohere2(config: Config) -> ModelConfig:
    """Command R7B: three of four layers have a window, and only these rotate."""
    full = stated(config, sliding_window=4096)
    period = full.get("sliding_window_pattern") or full.get("_sliding_window_pattern") or 4
    windows = read_windows(full, lambda layer: (layer + 1) % period != 0)
    windowed = bool(windows["sliding_window"])
    unrotated = windows["full_attention_layers"] if windowed else frozenset(range(full["num_hidden_layers"]))
    return replace(_read(full), unrotated_layers=unrotated, **windows)


def _read(config: Config) -> ModelConfig:
    full = stated(
        config, max_position_embeddings=8192, layer_norm_eps=1e-5, logit_scale=0.0625, tie_word_embeddings=True
    )
    return replace(
        llama.read(full | {"mlp_bias": False}),
        norm="layer",
        norm_eps=full["layer_norm_eps"],
        norm_bias=False,
        parallel_residual=True,
        shared_norm=True,
        logits_scale=1.0 if full["logit_scale"] is None else full["logit_scale"],
    )
