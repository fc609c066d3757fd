"""SmolLM2 by transformers, in fp32 and uncached: what everything is compared with."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

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
    model.load_state_dict(dict(checkpoint.tensors(torch.float32)), strict=False)
    return model.eval()
