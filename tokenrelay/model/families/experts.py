"""Mixtures of experts: how ``config.json`` describes them, and the names their tensors have. No torch."""

from __future__ import annotations

from tokenrelay.model.config import Experts
from tokenrelay.model.families.family import EXPERT, Config, Rule, either

_MLP = r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\."
_EXPERT = r"layers.\1.mlp.experts.\2."
_STACK = r"layers.\1.mlp.experts." + EXPERT

RULES = (  # one tensor per expert, as published; or one for all, as in the memory of transformers 5
    Rule(_MLP + r"(?:gate|router)\.(weight|bias)", r"layers.\1.mlp.router.\2"),
    Rule(_MLP + r"experts\.(\d+)\.(gate|up)_proj\.(weight)", _EXPERT + r"up_proj.\4", r"\3"),
    Rule(_MLP + r"experts\.(\d+)\.w1\.(weight)", _EXPERT + r"up_proj.\3", "gate"),
    Rule(_MLP + r"experts\.(\d+)\.w3\.(weight)", _EXPERT + r"up_proj.\3", "up"),
    Rule(_MLP + r"experts\.(\d+)\.(?:down_proj|w2)\.(weight)", _EXPERT + r"down_proj.\3"),
    Rule(_MLP + r"experts\.gate_up_proj", _STACK + ".up_proj.weight"),
    Rule(_MLP + r"experts\.down_proj", _STACK + ".down_proj.weight"),
    Rule(_MLP + r"shared_expert\.(gate|up)_proj\.(weight)", r"layers.\1.mlp.shared_expert.up_proj.\3", r"\2"),
    Rule(_MLP + r"shared_expert\.down_proj\.(weight)", r"layers.\1.mlp.shared_expert.down_proj.\2"),
    Rule(_MLP + r"shared_expert_gate\.(weight)", r"layers.\1.mlp.shared_gate.\2"),
)


def read_experts(config: Config, intermediate_size: int, *, normalize_weights: bool = True) -> Experts:
    """Of ``intermediate_size`` each, chosen by a router without a bias."""
    return Experts(
        num_experts=either(config, "num_local_experts", "num_experts"),
        num_experts_per_token=config["num_experts_per_tok"],
        intermediate_size=intermediate_size,
        normalize_weights=normalize_weights,
    )


def dense_layers(config: Config) -> frozenset[int]:
    """The layers that have an ordinary MLP, as Qwen says it."""
    named, step = config.get("mlp_only_layers") or (), config.get("decoder_sparse_step", 1)
    return frozenset(layer for layer in range(config["num_hidden_layers"]) if layer in named or (layer + 1) % step)
