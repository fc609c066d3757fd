"""Matrices of few bits: integers, with a scale for every group of 32 elements of a row. (GGUF's Q8_0, Q4_0, Q4_1)"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 32
LARGEST = 127
LARGEST_4_BITS = 15
CHUNK = 31 << 10  # elements converted at once: in fp32 just less than what is mapped while loading (``heap``)


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

    @property
    def bits(self) -> int:
        return 8 if self.minima is None else 4

    def mapped(self, rearrange: Callable[[Tensor], Tensor]) -> Quantized:
        """With its rows in another order: all parts have one row per row."""
        minima = None if self.minima is None else rearrange(self.minima).contiguous()
        return Quantized(rearrange(self.integers).contiguous(), rearrange(self.scales).contiguous(), minima)

    def dequantized(self) -> Tensor:
        """[N, K] fp32."""
        rows, columns = self.shape
        groups = self.integers.reshape(rows, -1, GROUP).float() * self.scales.float().unsqueeze(-1)
        if self.minima is not None:
            groups += self.minima.float().unsqueeze(-1)
        return groups.view(rows, columns)


def can_quantize(shape: torch.Size) -> bool:
    """Whether rows [N, K] divide into groups."""
    return shape[-1] % GROUP == 0


def quantize(weight: Tensor) -> Quantized:
    """The nearest 8-bit integers: the largest of a group becomes 127 or -127. Scales are fp16, rounded first."""
    chunks = torch.split(weight.detach().reshape(-1, GROUP), CHUNK // GROUP)
    integers, scales = (torch.cat(parts) for parts in zip(*map(_nearest, chunks), strict=True))
    return Quantized(integers.view(weight.shape), scales.view(weight.shape[0], -1))


def _nearest(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Of [G, 32]: int8, and scales [G]."""
    groups = groups.float()
    scales = (groups.abs().amax(-1) / LARGEST).half()
    factors = torch.where(scales > 0, scales.float().reciprocal(), 0.0)
    integers = (groups * factors.unsqueeze(-1)).round_().clamp_(-LARGEST, LARGEST)
    return integers.to(torch.int8), scales


def quantize_to_4_bits(weight: Tensor) -> Quantized:
    """Integers, scales and minima of a small squared error, searched for group by group."""
    chunks = torch.split(weight.detach().reshape(-1, GROUP), CHUNK // GROUP)
    integers, scales, minima = (torch.cat(parts) for parts in zip(*map(_searched, chunks), strict=True))
    rows = weight.shape[0]
    return Quantized(integers.view(weight.shape), scales.view(rows, -1), minima.view(rows, -1))


Rounded = tuple[Tensor, Tensor, Tensor]  # integers [G, 32], scale and minimum [G, 1]


def _searched(groups: Tensor) -> Rounded:
    """Of [G, 32]: from the whole range, and from those that give up a twentieth at an end, two least-squares steps.

    (the alternation of Lloyd's algorithm: integers for this line, then the line for these integers; better by a fifth
    than the range alone)
    """
    groups = groups.float()
    low, high = groups.aminmax(dim=1, keepdim=True)
    cut = (high - low) / 20
    best = _rounded(groups, (high - low) / LARGEST_4_BITS, low)
    for start, end in ((low, high), (low + cut, high), (low, high - cut), (low + cut, high - cut)):
        found = _rounded(groups, (end - start) / LARGEST_4_BITS, start)
        for _ in range(2):
            found = _rounded(groups, *_line_through(groups, found[0]))
            better = _error(groups, *found) < _error(groups, *best)
            best = _where(better, found, best)
    integers, scale, minimum = best
    return integers.to(torch.uint8), scale, minimum


def _rounded(groups: Tensor, scale: Tensor, minimum: Tensor) -> Rounded:
    """The nearest integers for a scale and a minimum [G, 1], which are rounded to fp16 first."""
    scale, minimum = scale.half(), minimum.half()
    factor = torch.where(scale > 0, scale.float().reciprocal(), 0.0)
    return ((groups - minimum.float()) * factor).round_().clamp_(0, LARGEST_4_BITS), scale, minimum


def _line_through(groups: Tensor, integers: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and minimum of the least squared error for these integers."""
    centre, mean = integers.mean(1, keepdim=True), groups.mean(1, keepdim=True)
    spread = integers - centre
    scale = (spread * (groups - mean)).sum(1, keepdim=True) / spread.square().sum(1, keepdim=True).clamp_min(1e-12)
    return scale, mean - scale * centre


def _where(better: Tensor, new: Rounded, old: Rounded) -> Rounded:
    return torch.where(better, new[0], old[0]), torch.where(better, new[1], old[1]), torch.where(better, new[2], old[2])


def _error(groups: Tensor, integers: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    return (integers * scale.float() + minimum.float() - groups).square_().sum(1, keepdim=True)


def stacked(parts: Sequence[Quantized]) -> Quantized:
    """One matrix of the rows of several, as exact as they are if they are of one kind."""
    if len(parts) == 1:
        return parts[0]
    if len({part.bits for part in parts}) > 1:
        return quantize(torch.cat([part.dequantized() for part in parts]))
    minima = [part.minima for part in parts if part.minima is not None]
    return Quantized(
        torch.cat([part.integers for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(minima) if minima else None,
    )
