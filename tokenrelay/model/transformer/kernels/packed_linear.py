"""Linear layers with packed weights: a replacement for ``nn.Linear``, made after the weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tokenrelay.model.quantized import Quantized, can_quantize, quantize
from tokenrelay.model.transformer import kernels
from tokenrelay.model.transformer.kernels import native, reference


class PackedLinear(nn.Module):
    """y = x W^T + b with W in panels [ceil(N / 16), K, 16], in the dtype it was loaded in (bf16 or fp32).

    Without the native library W stays [N, K] and becomes fp32, the dtype of the activations.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight [N, K], bias [N]."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        stored = weight.detach() if weight.dtype in native.STORED else weight.detach().float()
        self.register_buffer("weight", reference.pack(stored) if native.is_available() else stored.float())
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N]."""
        return kernels.linear(x, self.weight, self.bias, self.out_features)


class QuantizedLinear(nn.Module):
    """y = x W^T + b with W of 8 or 4 bits and activations of 8, in groups of 32. (``kernels.quantized_linear``)"""

    panels: Tensor
    scales: Tensor
    minima: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Quantized, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("panels", reference.pack_integers(weight.integers))
        self.register_buffer("scales", reference.pack(weight.scales))
        self.register_buffer("minima", None if weight.minima is None else reference.pack(weight.minima))
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N]."""
        return kernels.quantized_linear(x, self.panels, self.scales, self.minima, self.bias, self.out_features)


@torch.no_grad()
def replace_linears(module: nn.Module, quantized: Mapping[str, Quantized], in_8_bits: bool, path: str = "") -> None:
    """Swap every ``nn.Linear`` below ``module`` for one with packed weights, one at a time, each original freed.

    ``quantized``: weights that came with few bits, by name; the others get 8 if ``in_8_bits``, where groups fit.

    A head tied to the embedding gets its own packed copy, since the embedding still needs its [V, D] rows: that costs
    V x D once more (57 MB for SmolLM2-135M in bf16).
    """
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, _packed(child, quantized.get(f"{path}{name}.weight"), in_8_bits))
        else:
            replace_linears(child, quantized, in_8_bits, f"{path}{name}.")


def _packed(linear: nn.Linear, weight: Quantized | None, in_8_bits: bool) -> nn.Module:
    if weight is None and in_8_bits and can_quantize(linear.weight):
        weight = quantize(linear.weight)
    return PackedLinear(linear.weight, linear.bias) if weight is None else QuantizedLinear(weight, linear.bias)
