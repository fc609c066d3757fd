"""From a checkpoint's tensors to a network that is ready to run on a device.

The table below says where each tensor of a family goes; q, k and v are rows of one matrix here, as are gate and
up. A tensor that is missing, unknown or of the wrong shape is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.transformer.kernels import native
from tokenrelay.model.transformer.kernels.packed_linear import replace_linears
from tokenrelay.model.transformer.layers import LayerNorm, RMSNorm
from tokenrelay.model.transformer.rope import rotary_table
from tokenrelay.model.transformer.transformer import Transformer


class WeightsError(ValueError):
    """The checkpoint's tensors do not fit its configuration; the message names them."""


class _Rule(NamedTuple):
    pattern: str  # of the checkpoint's name, as transformers writes it
    target: str  # our name
    shard: str = ""  # which rows of a merged matrix
    transposed: bool = False  # GPT-2 stores [in, out]


_RULES = {
    "llama": (
        _Rule(r"model\.embed_tokens\.(weight)", r"embed_tokens.\1"),
        _Rule(r"model\.layers\.(\d+)\.input_layernorm\.(weight)", r"layers.\1.attention_norm.\2"),
        _Rule(r"model\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", r"layers.\1.attention.qkv_proj.\2", "q"),
        _Rule(r"model\.layers\.(\d+)\.self_attn\.k_proj\.(weight|bias)", r"layers.\1.attention.qkv_proj.\2", "k"),
        _Rule(r"model\.layers\.(\d+)\.self_attn\.v_proj\.(weight|bias)", r"layers.\1.attention.qkv_proj.\2", "v"),
        _Rule(r"model\.layers\.(\d+)\.self_attn\.o_proj\.(weight|bias)", r"layers.\1.attention.o_proj.\2"),
        _Rule(r"model\.layers\.(\d+)\.post_attention_layernorm\.(weight)", r"layers.\1.mlp_norm.\2"),
        _Rule(r"model\.layers\.(\d+)\.mlp\.gate_proj\.(weight|bias)", r"layers.\1.mlp.up_proj.\2", "gate"),
        _Rule(r"model\.layers\.(\d+)\.mlp\.up_proj\.(weight|bias)", r"layers.\1.mlp.up_proj.\2", "up"),
        _Rule(r"model\.layers\.(\d+)\.mlp\.down_proj\.(weight|bias)", r"layers.\1.mlp.down_proj.\2"),
        _Rule(r"model\.norm\.(weight)", r"norm.\1"),
        _Rule(r"lm_head\.(weight)", r"lm_head.\1"),
    ),
    "gpt2": (
        _Rule(r"(?:transformer\.)?wte\.(weight)", r"embed_tokens.\1"),
        _Rule(r"(?:transformer\.)?wpe\.(weight)", r"embed_positions.\1"),
        _Rule(r"(?:transformer\.)?h\.(\d+)\.ln_1\.(weight|bias)", r"layers.\1.attention_norm.\2"),
        _Rule(r"(?:transformer\.)?h\.(\d+)\.attn\.c_attn\.(weight)", r"layers.\1.attention.qkv_proj.\2", "", True),
        _Rule(r"(?:transformer\.)?h\.(\d+)\.attn\.c_attn\.(bias)", r"layers.\1.attention.qkv_proj.\2"),
        _Rule(r"(?:transformer\.)?h\.(\d+)\.attn\.c_proj\.(weight)", r"layers.\1.attention.o_proj.\2", "", True),
        _Rule(r"(?:transformer\.)?h\.(\d+)\.attn\.c_proj\.(bias)", r"layers.\1.attention.o_proj.\2"),
        _Rule(r"(?:transformer\.)?h\.(\d+)\.ln_2\.(weight|bias)", r"layers.\1.mlp_norm.\2"),
        _Rule(r"(?:transformer\.)?h\.(\d+)\.mlp\.c_fc\.(weight)", r"layers.\1.mlp.up_proj.\2", "", True),
        _Rule(r"(?:transformer\.)?h\.(\d+)\.mlp\.c_fc\.(bias)", r"layers.\1.mlp.up_proj.\2"),
        _Rule(r"(?:transformer\.)?h\.(\d+)\.mlp\.c_proj\.(weight)", r"layers.\1.mlp.down_proj.\2", "", True),
        _Rule(r"(?:transformer\.)?h\.(\d+)\.mlp\.c_proj\.(bias)", r"layers.\1.mlp.down_proj.\2"),
        _Rule(r"(?:transformer\.)?ln_f\.(weight|bias)", r"norm.\1"),
        _Rule(r"lm_head\.(weight)", r"lm_head.\1"),
    ),
}

_DERIVED = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$")  # buffers some checkpoints carry


def load_transformer(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_model_len: int,
    dtype: torch.dtype,
    device: torch.device,
    attention_sinks: int = 0,
) -> Transformer:
    """Build the network, fill it from (name, tensor) pairs, and make it ready for ``device``.

    On a CPU activations are fp32 whatever the weights are: its kernels accumulate in fp32 anyway. Peak memory is
    the weights in ``dtype`` and one tensor.

    Raises:
        WeightsError: the tensors do not fit the network.
        ValueError: ``attention_sinks`` do not suit the network or the device.
    """
    if attention_sinks and device.type != "cpu":
        raise ValueError(f"attention_sinks is not supported on {device.type}; set it to 0")
    model = _empty(config, max_model_len, attention_sinks, dtype, device)
    _fill(model, tensors)
    if device.type == "cpu" and native.is_available():
        replace_linears(model)
    return model.requires_grad_(False).eval()


def _empty(
    config: ModelConfig, max_model_len: int, attention_sinks: int, dtype: torch.dtype, device: torch.device
) -> Transformer:
    """The network with uninitialised parameters in their final types."""
    with torch.device("meta"):
        model = Transformer(config, max_model_len, attention_sinks).to(dtype)
    if device.type == "cpu":
        _keep_in_fp32(model, with_linears=not native.is_available())
    materialise(model, device)
    if config.positions == "rotary":
        model.rotary = rotary_table(config, max_model_len).to(device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model


def materialise(model: nn.Module, device: torch.device) -> None:
    """Give every meta parameter memory, uninitialised. (``to_empty`` would import torch's symbolic shapes for it)"""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            module.register_parameter(name, nn.Parameter(memory, requires_grad=False))


def _keep_in_fp32(model: nn.Module, *, with_linears: bool) -> None:
    """Norms always; matrices only where stock torch multiplies them, which needs one type and is slow in bf16."""
    kinds = (RMSNorm, LayerNorm, nn.Linear, nn.Embedding) if with_linears else (RMSNorm, LayerNorm)
    for module in model.modules():
        if isinstance(module, kinds):
            module.float()


def _fill(model: Transformer, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy every tensor to its place, and count rows so that a hole is noticed."""
    config = model.config
    parameters = dict(model.named_parameters())  # a tied head is listed once, as the embedding
    unfilled = {name: parameter.shape[0] for name, parameter in parameters.items()}
    for name, tensor in tensors:
        rule, target = _place(name, config)
        if _DERIVED.fullmatch(name) or (config.tie_word_embeddings and target == "lm_head.weight"):
            continue
        if rule is None or target not in parameters:
            raise WeightsError(f"tensor {name!r} has no place in a {config.architecture} network of this configuration")
        rows = _rows(parameters[target], rule.shard, config)
        _copy(name, tensor.T if rule.transposed else tensor, rows)
        unfilled[target] -= rows.shape[0]
    missing = sorted(name for name, rows in unfilled.items() if rows > 0)
    if missing:
        raise WeightsError(f"the checkpoint does not fill {', '.join(missing[:8])} ({len(missing)} in all)")


def _place(name: str, config: ModelConfig) -> tuple[_Rule | None, str]:
    for rule in _RULES[config.architecture]:
        match = re.fullmatch(rule.pattern, name)
        if match:
            return rule, match.expand(rule.target)
    return None, ""


def _rows(parameter: Tensor, shard: str, config: ModelConfig) -> Tensor:
    """The rows of a merged matrix, or bias, that a shard fills."""
    q, kv, up = config.q_size, config.kv_size, config.intermediate_size
    spans = {"": (0, parameter.shape[0]), "q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}
    spans |= {"gate": (0, up), "up": (up, 2 * up)}
    start, end = spans[shard]
    return parameter[start:end]


def _copy(name: str, source: Tensor, destination: Tensor) -> None:
    if source.shape != destination.shape:
        raise WeightsError(f"tensor {name!r} has shape {list(source.shape)}, expected {list(destination.shape)}")
    with torch.no_grad():
        destination.copy_(source)
