"""From a checkpoint's tensors to a network that is ready to run on a device.

The checkpoint's rules say where each tensor goes; q, k and v are rows of one matrix here, as are gate and up. A tensor
that is missing, unknown or of the wrong shape is refused by name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tokenrelay.model.config import ModelConfig, Quantization
from tokenrelay.model.families import Rule
from tokenrelay.model.quantized import Quantized, stacked
from tokenrelay.model.transformer.kernels import native
from tokenrelay.model.transformer.kernels.native_layers import replace_layers
from tokenrelay.model.transformer.layers import LayerNorm, RMSNorm
from tokenrelay.model.transformer.quantization import (
    check_quantization,
    keeps_stored,
    replace_embedding,
    replace_linears,
)
from tokenrelay.model.transformer.rope import rotary_table
from tokenrelay.model.transformer.transformer import Transformer
from tokenrelay.model.weights.layouts import LAYOUTS, ROW_ORDERS


class WeightsError(ValueError):
    """The checkpoint's tensors do not fit its configuration; the message names them."""


def load_transformer(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor | Quantized]],
    rules: Sequence[Rule],
    *,
    max_model_len: int,
    dtype: torch.dtype,
    device: torch.device,
    attention_sinks: int = 0,
    quantization: Quantization = "auto",
) -> Transformer:
    """Build the network, fill it from (name, tensor) pairs as the rules say, and make it ready for ``device``.

    Matrices that come quantized stay so where there are kernels for it, unless ``quantization`` is another.

    On a CPU activations are fp32 whatever the weights are: its kernels accumulate in fp32 anyway. Peak memory is
    the weights in ``dtype`` and one tensor.

    Raises:
        WeightsError: the tensors do not fit the network.
        ValueError: ``attention_sinks`` do not suit the network or the device, or ``quantization`` the device.
    """
    check_quantization(quantization, device)
    if attention_sinks and device.type != "cpu":
        raise ValueError(f"attention_sinks is not supported on {device.type}; set it to 0")
    model = _empty(config, max_model_len, attention_sinks, dtype, device)
    quantized = _fill(model, tensors, rules, keeps_stored(quantization, device))
    if device.type != "cpu" or native.is_available():
        replace_linears(model, quantized, quantization)
        replace_embedding(model, quantized, quantization)
    if device.type == "cpu" and native.is_available():
        replace_layers(model)
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


def _fill(
    model: Transformer,
    tensors: Iterable[tuple[str, Tensor | Quantized]],
    rules: Sequence[Rule],
    keep_quantized: bool,
) -> dict[str, Quantized]:
    """Copy every tensor to its place, and count rows so that a hole is noticed.

    Returns the matrices that stay quantized, by name. Their parameters are memory that was never touched.
    """
    config = model.config
    parameters = dict(model.named_parameters())  # a tied head is listed once, as the embedding
    unfilled = {name: parameter.shape[0] for name, parameter in parameters.items()}
    kept: dict[str, dict[int, Quantized]] = defaultdict(dict)  # by name, and by the row at which each begins
    for name, tensor in tensors:
        target, shard, layout = _place(name, rules)
        if not target or (config.tie_word_embeddings and target == "lm_head.weight"):
            continue
        if target not in parameters:
            raise WeightsError(f"tensor {name!r} has no place in a {config.architecture} network of this configuration")
        start, end = _span(parameters[target], shard, config)
        rows = parameters[target][start:end]
        matrix = _matrix_of(target, config)
        if isinstance(tensor, Quantized) and matrix and keep_quantized and (not layout or layout in ROW_ORDERS):
            _check_shape(name, tensor, rows)
            kept[matrix][start] = _in_our_order(tensor, layout, config)
        else:
            values = tensor.dequantized() if isinstance(tensor, Quantized) else tensor
            _copy(name, LAYOUTS[layout](values, config) if layout else values, rows)
        unfilled[target] -= end - start
    missing = sorted(name for name, rows in unfilled.items() if rows > 0)
    if missing:
        raise WeightsError(f"the checkpoint does not fill {', '.join(missing[:8])} ({len(missing)} in all)")
    return {name: whole for name, shards in kept.items() if (whole := _whole(shards, parameters.get(name)))}


def _in_our_order(stored: Quantized, layout: str, config: ModelConfig) -> Quantized:
    return stored.mapped(lambda rows: LAYOUTS[layout](rows, config)) if layout else stored


def _matrix_of(target: str, config: ModelConfig) -> str:
    """Which linear layer's matrix this is, if it is one: itself, or the head that an embedding is tied to."""
    if target == "embed_tokens.weight":
        return "lm_head.weight" if config.tie_word_embeddings else target
    return target if target.endswith(("_proj.weight", "lm_head.weight")) else ""


def _whole(shards: Mapping[int, Quantized], parameter: Tensor | None) -> Quantized | None:
    """One matrix, if all its shards came quantized; if not, these join the others in the parameter."""
    if parameter is None or sum(shard.shape[0] for shard in shards.values()) == parameter.shape[0]:
        return stacked([shards[start] for start in sorted(shards)])
    for start, shard in shards.items():
        parameter.data[start : start + shard.shape[0]] = shard.dequantized()
    return None


def _place(name: str, rules: Sequence[Rule]) -> tuple[str, str, str]:
    """Our name, the rows of it, and the layout; WeightsError if no rule knows the tensor."""
    for rule in rules:
        match = re.fullmatch(rule.pattern, name)
        if match:
            return match.expand(rule.target), match.expand(rule.shard), rule.layout
    raise WeightsError(f"tensor {name!r} has no place in a network of this family")


def _span(parameter: Tensor, shard: str, config: ModelConfig) -> tuple[int, int]:
    """The rows of a merged matrix, or bias, that a shard fills."""
    q, kv, up = config.q_size, config.kv_size, config.intermediate_size
    spans = {"": (0, parameter.shape[0]), "q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}
    spans |= {"gate": (0, up), "up": (up, 2 * up)}
    return spans[shard]


def _copy(name: str, source: Tensor, destination: Tensor) -> None:
    _check_shape(name, source, destination)
    with torch.no_grad():
        destination.copy_(source)


def _check_shape(name: str, source: Tensor | Quantized, destination: Tensor) -> None:
    if source.shape != destination.shape:
        raise WeightsError(f"tensor {name!r} has shape {list(source.shape)}, expected {list(destination.shape)}")
