"""Tiny random networks of transformers, and the same written as GGUF the way llama.cpp's converter lays it out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType
from gguf.quants import quantize
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LLAMA_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GPT2_NAMES = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}

_FACTORS = [1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]  # one per frequency of a head of 16
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": _FACTORS[::-1],
    "long_factor": _FACTORS,
    "original_max_position_embeddings": 32,
}


def tiny_llama(tie: bool = True, rope: dict[str, Any] | None = None) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tie,
        eos_token_id=2,
        rope_parameters=rope and dict(rope),
    )
    return LlamaForCausalLM(config)


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=128, eos_token_id=2))


def expected_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict as a file holds it: tied output embeddings are not written twice."""
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state


def write_gguf(model: PreTrainedModel, path: Path, kind: GGMLQuantizationType = GGMLQuantizationType.F32) -> None:
    """Matrices in ``kind``, vectors in F32, as quantized files have it."""
    llama = model.config.model_type == "llama"
    writer = GGUFWriter(path, model.config.model_type)
    _write_shape(writer, model, llama)
    for name, tensor in expected_tensors(model).items():
        values = tensor.detach().float()
        if llama and ("q_proj" in name or "k_proj" in name):
            values = _permuted(values, model.config.num_attention_heads if "q_proj" in name else 2)
        if not llama and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            values = values.T
        used = kind if values.ndim == 2 else GGMLQuantizationType.F32
        data = quantize(np.ascontiguousarray(values.numpy()), used)
        writer.add_tensor(gguf_name(name, llama), data, raw_dtype=used)
    if llama:
        _write_rope(writer, model.config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str, llama: bool) -> str:
    stem, kind = name.rsplit(".", 1)
    names, layers = (LLAMA_NAMES, "model.layers.") if llama else (GPT2_NAMES, "transformer.h.")
    if not stem.startswith(layers):
        return f"{names[stem]}.{kind}"
    layer, part = stem.removeprefix(layers).split(".", 1)
    return f"blk.{layer}.{names[part]}.{kind}"


def _permuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of q and k: rope turns neighbouring rows, not the halves of a head."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _write_shape(writer: GGUFWriter, model: PreTrainedModel, llama: bool) -> None:
    config = model.config
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_eos_token_id(2)
    if llama:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_feed_forward_length(4 * 64)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _write_rope(writer: GGUFWriter, config: LlamaConfig) -> None:
    """Scalars as metadata, lists as tensors; Llama 3's factors are finished by the converter."""
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if "original_max_position_embeddings" in rope and rope["rope_type"] != "llama3":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    match rope["rope_type"]:
        case "linear" | "yarn" as kind:
            writer.add_rope_scaling_type(RopeScalingType(kind))
            writer.add_rope_scaling_factor(rope["factor"])
            _write_yarn(writer, rope)
        case "llama3":
            frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
            plain = rope["rope_theta"] ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
            writer.add_tensor("rope_freqs.weight", (plain / frequencies).numpy())
        case "longrope":
            _, attention_factor = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
            writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
            writer.add_rope_scaling_attn_factors(attention_factor)
            for name in ("short", "long"):
                writer.add_tensor(f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], np.float32))


def _write_yarn(writer: GGUFWriter, rope: dict[str, Any]) -> None:
    for name, add in (
        ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
        ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
    ):
        if name in rope:
            add(rope[name])


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
    shapes = {"token_embd.weight": (96, 64), "blk.0.attn_norm.weight": (64,), "blk.0.ffn_up.weight": (96, 64)}
    for name, shape in (shapes | ({tensor[0]: (tensor[1],)} if tensor else {})).items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
