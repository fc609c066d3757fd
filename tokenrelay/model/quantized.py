"""Matrices of few bits: integers, with a scale for every group of 32 elements of a row. (GGUF's Q8_0, Q4_0, Q4_1)"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 32
LARGEST = 127


class Quantized(NamedTuple):
    """W [N, K] = integers * scales + minima.

    ``integers`` [N, K]: int8 without minima; or with minima uint8 below 16, which take 4 bits when packed.
    ``scales`` and ``minima`` [N, K / 32]: fp16.
    """

    integers: Tensor
    scales: Tensor
    minima: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.integers.shape

    def mapped(self, rearrange: Callable[[Tensor], Tensor]) -> Quantized:
        """With its rows in another order: all parts have one row per row."""
        minima = None if self.minima is None else rearrange(self.minima).contiguous()
        return Quantized(rearrange(self.integers).contiguous(), rearrange(self.scales).contiguous(), minima)

    def dequantized(self) -> Tensor:
        """[N, K] fp32."""
        rows, columns = self.shape
        groups = self.integers.view(rows, -1, GROUP).float() * self.scales.float().unsqueeze(-1)
        if self.minima is not None:
            groups += self.minima.float().unsqueeze(-1)
        return groups.view(rows, columns)


def can_quantize(weight: Tensor) -> bool:
    """Whether rows [N, K] divide into groups."""
    return weight.shape[-1] % GROUP == 0


def quantize(weight: Tensor) -> Quantized:
    """The nearest 8-bit integers: the largest of a group becomes 127 or -127. Scales are fp16, rounded first."""
    groups = weight.detach().float().view(weight.shape[0], -1, GROUP)
    scales = (groups.abs().amax(-1) / LARGEST).half()
    factors = torch.where(scales > 0, scales.float().reciprocal(), 0.0)
    integers = (groups * factors.unsqueeze(-1)).round_().clamp_(-LARGEST, LARGEST)
    return Quantized(integers.to(torch.int8).view(weight.shape), scales)


def stacked(parts: Sequence[Quantized]) -> Quantized:
    """One matrix of the rows of several, as exact as they are if they are of one kind."""
    if len(parts) == 1:
        return parts[0]
    if len({part.minima is None for part in parts}) > 1:
        return quantize(torch.cat([part.dequantized() for part in parts]))
    minima = [part.minima for part in parts if part.minima is not None]
    return Quantized(
        torch.cat([part.integers for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(minima) if minima else None,
    )
