"""The paged KV cache: one pair of tensors per layer, cut into blocks. Who holds which block is the engine's affair."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.transformer import kernels


class LayerCache(NamedTuple):
    """Keys and values of one layer; their layout belongs to the device's attention kernel."""

    keys: Tensor
    values: Tensor


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Memory of one block over all layers, keys and values."""
    return 2 * config.num_layers * config.kv_size * block_size * dtype.itemsize


def allocate_kv_cache(
    config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[LayerCache]:
    """One zeroed ``LayerCache`` per layer. Zeroed, for a masked key must not be a NaN."""
    shapes = kernels.kv_cache_shapes(device, num_blocks, block_size, config.num_kv_heads, config.head_dim)
    return [LayerCache(*(_zeros(shape, dtype, device) for shape in shapes)) for _ in range(config.num_layers)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU through numpy, whose zeros are pages that take no time and no memory before they are touched."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
