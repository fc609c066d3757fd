"""The paged KV cache: one pair of tensors per layer, cut into blocks. Who holds which block is the engine's affair."""

from __future__ import annotations

from typing import NamedTuple

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
    return [
        LayerCache(*(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes))
        for _ in range(config.num_layers)
    ]
