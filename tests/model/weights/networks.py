"""Tiny random networks of transformers, and GGUF files that say no more than they must."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

_FACTORS = [1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]  # one per frequency of a head of 16
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": _FACTORS[::-1],
    "long_factor": _FACTORS,
    "original_max_position_embeddings": 32,
}
_LLAMA: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
}


def tiny_llama(
    tie: bool = True, rope: dict[str, Any] | None = None, seed: int = 0, **differences: Any
) -> LlamaForCausalLM:
    """``differences`` are fields of its configuration that are not as usual here."""
    torch.manual_seed(seed)
    fields = _LLAMA | {"tie_word_embeddings": tie, "rope_parameters": rope and dict(rope)} | differences
    return LlamaForCausalLM(LlamaConfig(**fields))


def saved_llama(folder: Path, **differences: Any) -> Path:
    """A folder as transformers writes it, with an output matrix of its own."""
    tiny_llama(tie=False, **differences).save_pretrained(folder)
    return folder


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=128, eos_token_id=2))


def expected_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict as a file holds it: tied output embeddings are not written twice."""
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state


def with_metadata(path: Path, add: Callable[[GGUFWriter], object], tensor: tuple[str, int] | None = None) -> Path:
    """A file that says no more than it must, what ``add`` writes, and a tensor of zeros by name and size."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_feed_forward_length(96)
    writer.add_layer_norm_rms_eps(1e-5)
    add(writer)
    shapes = {"token_embd.weight": (96, 64), "blk.0.attn_output.weight": (64, 64)}
    shapes |= {"blk.0.attn_k.weight": (64, 64), "blk.0.ffn_down.weight": (64, 96)}
    for name, shape in (shapes | ({tensor[0]: (tensor[1],)} if tensor else {})).items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
