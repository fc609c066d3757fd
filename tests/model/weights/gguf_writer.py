"""Networks of transformers written as GGUF, the way llama.cpp's converter lays them out.

Names come from the gguf package's own table; what the converter does to a tensor besides is below, by architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, RopeScalingType, get_tensor_name_map
from gguf.quants import quantize
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ARCHITECTURES = {
    "gpt2": MODEL_ARCH.GPT2,
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "mixtral": MODEL_ARCH.LLAMA,
    "smollm3": MODEL_ARCH.SMOLLM3,
    "arcee": MODEL_ARCH.ARCEE,
    "granite": MODEL_ARCH.GRANITE,
    "granitemoe": MODEL_ARCH.GRANITE_MOE,
    "granitemoeshared": MODEL_ARCH.GRANITE_MOE,
    "ernie4_5": MODEL_ARCH.ERNIE4_5,
    "seed_oss": MODEL_ARCH.SEED_OSS,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen2_moe": MODEL_ARCH.QWEN2MOE,
    "qwen3": MODEL_ARCH.QWEN3,
    "qwen3_moe": MODEL_ARCH.QWEN3MOE,
    "gemma": MODEL_ARCH.GEMMA,
    "gemma2": MODEL_ARCH.GEMMA2,
    "gemma3_text": MODEL_ARCH.GEMMA3,
    "phi": MODEL_ARCH.PHI2,
    "phi3": MODEL_ARCH.PHI3,
    "olmo": MODEL_ARCH.OLMO,
    "olmo2": MODEL_ARCH.OLMO2,
    "olmo3": MODEL_ARCH.OLMO2,
    "olmoe": MODEL_ARCH.OLMOE,
    "stablelm": MODEL_ARCH.STABLELM,
    "falcon": MODEL_ARCH.FALCON,
    "starcoder2": MODEL_ARCH.STARCODER2,
    "nemotron": MODEL_ARCH.NEMOTRON,
    "cohere": MODEL_ARCH.COMMAND_R,
    "gpt_neox": MODEL_ARCH.GPTNEOX,
    "gpt_oss": MODEL_ARCH.GPT_OSS,
}
# Converters that derive from Llama's reorder q and k; transformers' own Cohere and Ernie rotate neighbours already.
_REORDERED = {"llama", "mistral", "mixtral", "smollm3", "arcee", "granite", "granitemoe", "granitemoeshared", "olmo"}
_NORMS_PLUS_ONE = {"gemma", "gemma2", "gemma3_text", "nemotron"}


Encoded = tuple[str, npt.NDArray[Any], GGMLQuantizationType]  # a tensor by its name, as it is in the file


def write_gguf(model: PreTrainedModel, path: Path, kind: GGMLQuantizationType = GGMLQuantizationType.F32) -> Path:
    """Matrices in ``kind``, if their rows divide into its blocks; the others in F32, as quantized files have it."""
    return write_encoded(model.config, path, (_rounded(name, values, kind) for name, values in gguf_tensors(model)))


def _rounded(name: str, values: Tensor, kind: GGMLQuantizationType) -> Encoded:
    used = kind if is_quantized(name, values) else GGMLQuantizationType.F32
    return name, quantize(np.ascontiguousarray(values.numpy()), used), used


def is_quantized(name: str, values: Tensor) -> bool:
    """Vectors, routers and the biases of experts never are."""
    return values.ndim > 1 and name.endswith(".weight") and "ffn_gate_inp" not in name


def write_encoded(config: Any, path: Path, tensors: Iterable[Encoded]) -> Path:
    """A file of this network's description and these tensors."""
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]])
    write_metadata(writer, config)
    for name, data, kind in tensors:
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """As the converter writes them; tied output embeddings are not written twice."""
    config = model.config
    names = get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        for part, values in _pieces(name, tensor.detach().float(), config):
            found = names.get_name(part, try_suffixes=(".weight", ".bias"))
            found = f"{found}.weight" if part.endswith(".sinks") else found
            assert found is not None, f"llama.cpp has no name for {part}"
            yield found, values


def _pieces(name: str, values: Tensor, config: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors that the converter makes of one, under names that its table knows."""
    name = name.replace("block_sparse_moe.router.", "block_sparse_moe.router.layer.")
    name = name.replace("block_sparse_moe.experts.", "mlp.experts.")
    stem, _, last = name.rpartition(".")
    if ".experts." in name or "input_linear" in name or "output_linear" in name:
        yield from _experts(stem, last, values, config)
    elif "query_key_value" in name:
        reorder = _falcon_rows if config.model_type == "falcon" else _neox_rows
        yield name, reorder(values, config)
    elif config.model_type == "gpt2" and last == "weight" and stem.endswith(("c_attn", "c_proj", "c_fc")):
        yield name, values.T
    elif config.model_type in _REORDERED and stem.endswith(("q_proj", "k_proj")):
        heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
        yield name, values.reshape(heads, 2, -1, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
    elif config.model_type in _NORMS_PLUS_ONE and "norm" in stem and last == "weight":
        yield name, values + 1
    else:
        yield name, values.squeeze() if stem.endswith("shared_expert_gate") else values


def _experts(stem: str, last: str, values: Tensor, config: Any) -> Iterator[tuple[str, Tensor]]:
    """Gate and up are written apart; of GPT-OSS they alternate, and its matrices are transposed."""
    if "linear" in stem:
        mlp, last = stem.rpartition(".")[0], "gate_up_proj" if "input" in stem else "down_proj"
        place = mlp.replace("block_sparse_moe", "mlp.experts").replace("shared_mlp", "mlp.shared_expert")
    else:
        place = stem
    kind = "bias" if last.endswith("_bias") else "weight"
    if config.model_type == "gpt_oss" and kind == "weight":
        values = values.transpose(1, 2)
    if last.startswith("down_proj"):
        yield f"{place}.down_proj.{kind}", values
        return
    axis = values.ndim - (1 if kind == "bias" else 2)
    rows = values.movedim(axis, 0)
    gate, up = (rows[::2], rows[1::2]) if config.model_type == "gpt_oss" else rows.chunk(2)
    yield f"{place}.gate_proj.{kind}", gate.movedim(0, axis)
    yield f"{place}.up_proj.{kind}", up.movedim(0, axis)


def _neox_rows(values: Tensor, config: Any) -> Tensor:
    """Each head's q, k and v follow one another; they are written as all q, all k, all v."""
    heads = values.reshape(config.num_attention_heads, 3, -1, *values.shape[1:])
    return heads.transpose(0, 1).reshape(values.shape)


def _falcon_rows(values: Tensor, config: Any) -> Tensor:
    """The same by groups of heads that share a key."""
    kv = config.num_kv_heads if config.new_decoder_architecture or not config.multi_query else 1
    groups = values.reshape(kv, -1, config.hidden_size // config.num_attention_heads, *values.shape[1:])
    q, k, v = groups[:, :-2], groups[:, -2:-1], groups[:, -1:]
    return torch.cat([part.flatten(0, 2) for part in (q, k, v)])


def write_metadata(writer: GGUFWriter, config: Any) -> None:
    """What the converter writes for every text model, and for this one."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads)
    writer.add_feed_forward_length(_intermediate_size(config))
    writer.add_eos_token_id(config.eos_token_id)
    _write_if(config, writer.add_head_count_kv, "num_key_value_heads")
    _write_if(config, writer.add_layer_norm_rms_eps, "rms_norm_eps")
    for name in ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"):
        _write_if(config, writer.add_layer_norm_eps, name)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if config.model_type != "gpt2":
        _write_rope(writer, config, getattr(config, "head_dim", None) or hidden // heads)
    _write_experts(writer, config)
    _write_own(writer, config)


def _write_if(config: Any, add: Callable[[Any], object], name: str) -> None:
    if getattr(config, name, None) is not None:
        add(getattr(config, name))


def _intermediate_size(config: Any) -> int:
    for name in ("intermediate_size", "n_inner", "ffn_hidden_size"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return 4 * int(config.hidden_size)


def _write_experts(writer: GGUFWriter, config: Any) -> None:
    _write_if(config, writer.add_expert_used_count, "num_experts_per_tok")
    _write_if(
        config, writer.add_expert_count, "num_local_experts" if hasattr(config, "num_local_experts") else "num_experts"
    )
    _write_if(config, writer.add_expert_feed_forward_length, "moe_intermediate_size")
    _write_if(config, writer.add_expert_shared_feed_forward_length, "shared_expert_intermediate_size")
    _write_if(config, writer.add_expert_shared_feed_forward_length, "shared_intermediate_size")
    if config.model_type == "gpt_oss":
        writer.add_expert_feed_forward_length(config.intermediate_size)


def _write_own(writer: GGUFWriter, config: Any) -> None:
    """Keys of single architectures."""
    match config.model_type:
        case "granite" | "granitemoe" | "granitemoeshared":
            writer.add_attention_scale(config.attention_multiplier)
            writer.add_embedding_scale(config.embedding_multiplier)
            writer.add_residual_scale(config.residual_multiplier)
            writer.add_logit_scale(config.logits_scaling)
        case "cohere":
            writer.add_logit_scale(config.logit_scale)
        case "gemma2":
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
            writer.add_sliding_window(config.sliding_window)
        case "gemma3_text" | "gpt_oss" | "olmo3" | "phi3":
            writer.add_sliding_window(config.sliding_window or 0)
        case "falcon":
            writer.add_head_count_kv(config.num_kv_heads if config.new_decoder_architecture else 1)
        case "gpt_neox":
            writer.add_parallel_residual(config.use_parallel_residual)
        case "stablelm":
            writer.add_parallel_residual(config.use_parallel_residual)
        case "olmo":
            writer.add_layer_norm_eps(1e-5)
    if config.model_type == "olmo3":
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])


def _write_rope(writer: GGUFWriter, config: Any, head_dim: int) -> None:
    """Scalars as metadata, lists as tensors; Llama 3's factors are finished by the converter."""
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if "original_max_position_embeddings" in rope and rope["rope_type"] != "llama3":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    match rope["rope_type"]:
        case "linear" | "yarn" as kind:
            writer.add_rope_scaling_type(RopeScalingType(kind))
            writer.add_rope_scaling_factor(rope["factor"])
            _write_yarn(writer, rope)
        case "llama3":
            frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
            plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
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
