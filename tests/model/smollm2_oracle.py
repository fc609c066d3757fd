"""SmolLM2 by transformers, in fp32 and uncached: what everything is compared with."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokenrelay.model.transformer.placing import Placed, placed
from tokenrelay.model.weights.checkpoint import open_checkpoint
from tokenrelay.model.weights.sources import resolve


def load_oracle(path: Path) -> LlamaForCausalLM:
    """From our reading of the file: transformers' own conversion takes the wrong tokenizer."""
    checkpoint = open_checkpoint(resolve(str(path)))
    c = checkpoint.config()
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.norm_eps,
        rope_theta=c.rope_theta,
        tie_word_embeddings=c.tie_word_embeddings,
    )
    model = LlamaForCausalLM(config)
    tensors = placed(checkpoint.tensors(torch.float32), checkpoint.rules, c)
    found = model.load_state_dict({_name(one): one.tensor for one in tensors}, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["lm_head.weight"], [])  # it is tied
    return model.eval()


def _name(one: Placed) -> str:
    """As transformers calls it."""
    merged = f"{one.shard}_proj"
    theirs = {
        "attention_norm": "input_layernorm",
        "attention": "self_attn",
        "qkv_proj": merged,
        "mlp_norm": "post_attention_layernorm",
        "up_proj": merged,
    }
    return ".".join(["model", *(theirs.get(part, part) for part in one.target.split("."))])
