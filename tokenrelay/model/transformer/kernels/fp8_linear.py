"""Products of 8-bit floats on a GPU that has them (compute capability 8.9 and later).

Checked under FakeTensorMode only: shapes, types and devices, no values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
_STEP = 16  # ``torch._scaled_mm`` wants both sides to be multiples of this
_TINY = 1e-12


def fits_fp8(weight: Tensor) -> bool:
    """Whether [N, K] has sides that the product takes."""
    return weight.shape[0] % _STEP == 0 and weight.shape[1] % _STEP == 0


class Fp8Linear(nn.Module):
    """y = x W^T + b, both rounded to 8-bit floats with a scale for each row of W and, at every call, of x."""

    weight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight [N, K], bias [N]."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        rounded, scales = rounded_rows(weight.detach())
        self.register_buffer("weight", rounded)
        self.register_buffer("scales", scales.T)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N]."""
        rounded, scales = rounded_rows(x)
        out = torch._scaled_mm(rounded, self.weight.T, scales, self.scales, self.bias, out_dtype=torch.bfloat16)
        return out.to(x.dtype)


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[T, K] -> 8-bit floats [T, K] and scales [T, 1] fp32: a row's largest element becomes the largest float."""
    scales = x.abs().amax(1, keepdim=True).float().clamp_min(_TINY) / LARGEST
    return (x.float() / scales).clamp(-LARGEST, LARGEST).to(FP8), scales
