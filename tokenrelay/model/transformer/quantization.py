"""``--quantization``: what takes the place of each ``nn.Linear`` once the weights are loaded."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from tokenrelay.model.config import Quantization
from tokenrelay.model.quantized import Quantized, can_quantize, quantize, quantize_to_4_bits
from tokenrelay.model.transformer.kernels import native
from tokenrelay.model.transformer.kernels.fp8_linear import Fp8Linear, fits_fp8
from tokenrelay.model.transformer.kernels.packed_linear import EmbeddingRows, PackedLinear, QuantizedLinear
from tokenrelay.model.transformer.shards import Shards, built
from tokenrelay.model.transformer.transformer import Transformer

_ON_DEVICE: dict[str, tuple[Quantization, ...]] = {
    "cpu": ("auto", "none", "int8", "int8-weight-only", "int4"),
    "cuda": ("auto", "none", "int8-weight-only", "int4", "fp8"),
}
_ELSEWHERE: tuple[Quantization, ...] = ("auto", "none", "int8-weight-only", "int4")
HEAD, EMBEDDING = "lm_head", "embed_tokens"


def check_quantization(quantization: Quantization, device: torch.device) -> None:
    """Raises ValueError: there is nothing to multiply such weights with on this device."""
    known = _ON_DEVICE.get(device.type, _ELSEWHERE)
    if quantization not in known:
        raise ValueError(f"quantization {quantization} is not built for {device.type}; known: {', '.join(known)}")
    if device.type == "cpu" and quantization not in ("auto", "none") and not native.is_available():
        raise ValueError(f"quantization {quantization} needs native kernels. {native.why_unavailable()}")


def keeps_stored(quantization: Quantization, device: torch.device) -> bool:
    """Whether matrices that a checkpoint stores in few bits are wanted as they are.

    On a GPU ``auto`` has them dequantized: it has no kernel of its own for them, and memory only if that is asked for.
    """
    if device.type == "cpu":
        return quantization != "none" and native.is_available()
    return quantization in ("int8-weight-only", "int4")


@torch.no_grad()
def replace_matrix(model: nn.Module, path: str, shards: Shards | None, quantization: Quantization) -> None:
    """Swap the linear layer or the embedding at ``path``, its weights complete; any other module stays.

    ``shards``: its matrix, if that is not in the module. On a GPU what is not quantized stays as it is.
    """
    module = model.get_submodule(path)
    if isinstance(module, nn.Linear):
        replacement = _replacement(module, path.rpartition(".")[2], shards or _own(module), quantization)
        model.set_submodule(path, replacement)
        if path == HEAD and isinstance(model, Transformer) and model.config.tie_word_embeddings:
            _tie_embedding(model, replacement)
    elif isinstance(module, nn.Embedding) and path == EMBEDDING:
        _replace_embedding(model, shards or _own(module), quantization)


def _own(module: nn.Linear | nn.Embedding) -> Shards:
    return Shards({0: module.weight}, module.weight.dtype)


def _tie_embedding(model: Transformer, head: nn.Module) -> None:
    """It reads the head's matrix, if that is another now."""
    if isinstance(head, PackedLinear | QuantizedLinear):
        model.set_submodule(EMBEDDING, EmbeddingRows(head))


def _replace_embedding(model: nn.Module, weight: Shards, quantization: Quantization) -> None:
    """An embedding of its own has 8 bits where heads do."""
    if weight.bits and quantization == "auto":
        model.set_submodule(EMBEDDING, EmbeddingRows(built(weight, _as_it_came, None)))
    elif quantization.startswith("int") and can_quantize(weight.shape):
        model.set_submodule(EMBEDDING, EmbeddingRows(built(weight, _weight_only, None)))


def _replacement(linear: nn.Linear, name: str, weight: Shards, quantization: Quantization) -> nn.Module:
    """Routers and gates of experts are small, and decide much: they are never quantized."""
    if not can_quantize(weight.shape) or not name.endswith(("_proj", HEAD)):
        quantization = "auto"
    match quantization:
        case "int8":
            return built(weight, _in_8, linear.bias)
        case "int8-weight-only":
            return built(weight, _weight_only, linear.bias)
        case "int4":
            return built(weight, _in_8 if name == HEAD else _in_4, linear.bias)
        case "fp8" if name != HEAD and fits_fp8(linear.weight):
            return Fp8Linear(linear.weight, linear.bias)
    if weight.bits:
        return built(weight, _as_it_came, linear.bias)
    return built(weight, PackedLinear, linear.bias) if linear.weight.device.type == "cpu" else linear


def _as_it_came(weight: Tensor | Quantized, bias: Tensor | None) -> QuantizedLinear:
    assert isinstance(weight, Quantized)
    return QuantizedLinear(weight, bias)


def _in_8(weight: Tensor | Quantized, bias: Tensor | None) -> QuantizedLinear:
    return QuantizedLinear(_in_8_bits(weight), bias)


def _weight_only(weight: Tensor | Quantized, bias: Tensor | None) -> PackedLinear:
    return PackedLinear(_in_8_bits(weight), bias)


def _in_4(weight: Tensor | Quantized, bias: Tensor | None) -> QuantizedLinear:
    return QuantizedLinear(_in_4_bits(weight), bias)


def _in_8_bits(weight: Tensor | Quantized) -> Quantized:
    if isinstance(weight, Quantized):
        return weight if weight.bits == 8 else quantize(weight.dequantized())
    return quantize(weight)


def _in_4_bits(weight: Tensor | Quantized) -> Quantized:
    if isinstance(weight, Quantized):
        return weight if weight.bits == 4 else quantize_to_4_bits(weight.dequantized())
    return quantize_to_4_bits(weight)


def weight_bytes(model: nn.Module) -> int:
    """Of all parameters and of what replaced them, each counted once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def describe_weights(model: nn.Module) -> str:
    """For the log: "85 MB: 120 matrices in 4 bits, 1 in 8 bits"."""
    kinds: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, PackedLinear | QuantizedLinear | Fp8Linear | nn.Linear):
            kinds[_kind(module)] += 1
    counts = ", ".join(f"{count} in {kind}" for kind, count in kinds.most_common())
    return f"{weight_bytes(model) / 1e6:.0f} MB; matrices: {counts}"


def _kind(module: nn.Module) -> str:
    if isinstance(module, QuantizedLinear) or (isinstance(module, PackedLinear) and module.scales is not None):
        return f"{module.bits} bits"
    weight = module.weight
    assert isinstance(weight, Tensor)
    return str(weight.dtype).removeprefix("torch.")
