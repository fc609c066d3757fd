"""Granite 3, dense and with experts: Llama with four multipliers. (IBM 2024)"""

from __future__ import annotations

from dataclasses import replace

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families import experts, llama
from tokenrelay.model.families.family import EXPERT, Config, Rule

RULES = llama.RULES
_SPARSE = llama.LAYER + r"block_sparse_moe\."
MOE_RULES = (
    *llama.EMBEDDINGS,
    *llama.FINAL_NORM,
    *llama.NORMS,
    *llama.ATTENTION,
    Rule(_SPARSE + r"router(?:\.layer)?\.(weight)", r"layers.\1.mlp.router.\2"),
    Rule(_SPARSE + r"input_linear\.(weight)", r"layers.\1.mlp.experts." + EXPERT + r".up_proj.\2"),
    Rule(_SPARSE + r"output_linear\.(weight)", r"layers.\1.mlp.experts." + EXPERT + r".down_proj.\2"),
    Rule(llama.LAYER + r"shared_mlp\.input_linear\.(weight)", r"layers.\1.mlp.shared_expert.up_proj.\2"),
    Rule(llama.LAYER + r"shared_mlp\.output_linear\.(weight)", r"layers.\1.mlp.shared_expert.down_proj.\2"),
)


def read(config: Config) -> ModelConfig:
    """``logits_scaling`` divides."""
    return replace(
        llama.read(config),
        embedding_scale=float(config.get("embedding_multiplier") or 1.0),
        attention_scale=float(config.get("attention_multiplier") or 1.0),
        residual_scale=float(config.get("residual_multiplier") or 1.0),
        logits_scale=1 / float(config.get("logits_scaling") or 1.0),
    )


def read_moe(config: Config) -> ModelConfig:
    """``shared_intermediate_size``: of an expert that every token goes through, in GraniteMoeShared."""
    full = {"num_local_experts": 8, "num_experts_per_tok": 2} | dict(config) | {"mlp_bias": False}
    mixture = experts.read_experts(full, full["intermediate_size"])
    shared = full.get("shared_intermediate_size", 0) if full["model_type"] == "granitemoeshared" else 0
    return replace(read(full), experts=replace(mixture, shared_intermediate_size=shared))
