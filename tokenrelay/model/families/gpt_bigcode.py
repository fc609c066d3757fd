"""StarCoder and SantaCoder: GPT-2 with one key and one value for all heads. (Li et al. 2023)"""

from __future__ import annotations

from dataclasses import replace

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families import gpt2
from tokenrelay.model.families.family import Config, Rule, stated

_FUSED = Rule(gpt2.LAYER + r"\.attn\.c_attn\.(weight|bias)", r"layers.\1.attention.qkv_proj.\2", layout="grouped_qkv")
RULES = (_FUSED, *gpt2.EMBEDDINGS, *gpt2.NORMS, *gpt2.LINEARS)


def read(config: Config) -> ModelConfig:
    """Precision of the softmax aside, its keys are GPT-2's."""
    network = gpt2.read(stated(config, activation_function="gelu_pytorch_tanh"))
    return replace(network, num_kv_heads=1) if config.get("multi_query", True) else network
