"""Positions as sinusoids (Vaswani et al. 2017): computed, not learned, and added to the embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SinusoidalPositions(nn.Module):
    """Called as ``nn.Embedding``. Its table is filled when loading."""

    table: Tensor

    def __init__(self, max_len: int, size: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.empty(max_len, size), persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        """positions [T] int64 → [T, size]."""
        return self.table[positions]


def sinusoidal_table(max_len: int, size: int) -> Tensor:
    """[max_len, size] fp32: element 2i is sin(p / 10000^(2i / size)) at position p, element 2i + 1 its cosine."""
    positions = torch.arange(max_len, dtype=torch.float64).unsqueeze(1)
    angles = positions / 10_000 ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    return torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1).float()
