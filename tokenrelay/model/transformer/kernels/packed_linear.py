"""Linear layers whose weights are packed or of few bits: replacements for ``nn.Linear``, made after loading.

They give single rows of W, too, so that an embedding tied to the head needs no copy of its own (``EmbeddingRows``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenrelay.model.quantized import Quantized
from tokenrelay.model.transformer import kernels
from tokenrelay.model.transformer.kernels import native, reference


class PackedLinear(nn.Module):
    """y = x W^T + b with W in the dtype it was loaded in, or of 8 bits with scales; x is multiplied as it is.

    For the native library W is in panels [ceil(N / 16), K, 16] of bf16, fp32 or int8. Without it, and on other devices,
    it stays [N, K], and becomes fp32 on a CPU, the dtype of the activations.
    """

    weight: Tensor
    scales: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Tensor | Quantized, bias: Tensor | None = None) -> None:
        """weight [N, K], bias [N]."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        values = weight.integers if isinstance(weight, Quantized) else _multiplied_as(weight.detach())
        is_native = native.is_available() and values.device.type == "cpu"
        lay_out = reference.pack if is_native else torch.Tensor.contiguous
        self.register_buffer("weight", lay_out(values))
        self.register_buffer("scales", lay_out(weight.scales) if isinstance(weight, Quantized) else None)
        self.register_buffer("bias", _bias(bias, values.device))

    @property
    def bits(self) -> int:
        return 8 * self.weight.itemsize

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N]."""
        return kernels.linear(x, self.weight, self.bias, self.out_features, self.scales)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W by their numbers: [T] -> [T, K]."""
        values = reference.panel_rows(self.weight, ids)
        if self.scales is None:
            return values
        return Quantized(values, reference.panel_rows(self.scales, ids)).dequantized()


class QuantizedLinear(nn.Module):
    """y = x W^T + b with W of 8 or 4 bits and activations of 8, in groups of 32. (``kernels.quantized_linear``)"""

    panels: Tensor
    scales: Tensor
    minima: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Quantized, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bits = weight.bits
        self.register_buffer("panels", reference.pack_integers(weight.integers))
        self.register_buffer("scales", reference.pack(weight.scales))
        self.register_buffer("minima", None if weight.minima is None else reference.pack(weight.minima))
        self.register_buffer("bias", _bias(bias, weight.integers.device))

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N]."""
        return kernels.quantized_linear(x, self.panels, self.scales, self.minima, self.bias, self.out_features)

    def rows(self, ids: Tensor) -> Tensor:
        """As ``PackedLinear.rows``."""
        return kernels.quantized_rows(self.panels, self.scales, self.minima, ids, self.in_features)


class EmbeddingRows(nn.Module):
    """An embedding that reads its rows out of a packed matrix: that of the head which it is tied to, or its own."""

    def __init__(self, matrix: PackedLinear | QuantizedLinear) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, ids: Tensor) -> Tensor:
        """[T] -> [T, C]."""
        return self.matrix.rows(ids)


def _multiplied_as(weight: Tensor) -> Tensor:
    if weight.device.type != "cpu" or (native.is_available() and weight.dtype in native.STORED):
        return weight
    return weight.float()


def _bias(bias: Tensor | None, device: torch.device) -> Tensor | None:
    """On a CPU of the activations' dtype."""
    if bias is None:
        return None
    return bias.detach().float() if device.type == "cpu" else bias.detach()
