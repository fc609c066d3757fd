"""Stretched rotary positions equal transformers', in every way that checkpoints ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.model.families.running import load, logits

SIZE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "eos_token_id": 2,
}
ORIGINAL = {"original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    **ORIGINAL,
}


@pytest.mark.parametrize(
    ("rope", "max_position_embeddings", "num_tokens", "max_model_len"),
    [
        (LINEAR, 32, 60, 128),
        (YARN, 128, 60, 128),
        (LLAMA3, 128, 60, 128),
        (DYNAMIC, 32, 30, 32),
        (DYNAMIC, 32, 60, 60),
        (LONGROPE, 128, 30, 32),
        (LONGROPE, 128, 60, 128),
    ],
    ids=["linear", "yarn", "llama3", "dynamic within", "dynamic beyond", "longrope within", "longrope beyond"],
)
@torch.inference_mode()
def test_scaling_is_transformers_for_a_prompt_of_the_server_s_length(
    rope: dict[str, Any], max_position_embeddings: int, num_tokens: int, max_model_len: int, tmp_path: Path
) -> None:
    """Dynamic, longrope: for other lengths the two differ on purpose, as theirs change while a sequence grows."""
    torch.manual_seed(0)
    lengths = {"max_position_embeddings": max_position_embeddings}
    theirs = LlamaForCausalLM(LlamaConfig(**SIZE, **lengths, rope_parameters=dict(rope))).eval()
    theirs.save_pretrained(tmp_path)
    config, ours = load(tmp_path, max_model_len)
    ids = torch.randint(3, 128, (num_tokens,))
    assert (logits(config, ours, ids) - theirs(ids.unsqueeze(0)).logits[0]).abs().max() <= 1e-4
