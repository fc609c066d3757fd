"""The paged KV cache: one pair of tensors per layer, cut into blocks. Who holds which block is the engine's affair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.transformer import kernels
from tokenrelay.model.transformer.transfer import to_device


class LayerCache(NamedTuple):
    """Keys and values of one layer; their layout belongs to the device's attention kernel.

    A cache of integers has a scale for every key and every value of a head: [blocks, KV, block_size] fp32.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


def cache_dtype(choice: Literal["auto", "int8"], dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of a network whose floats are of ``dtype``. On a CPU 16 bits are integers: they multiply twice as fast."""
    if choice == "int8":
        return torch.int8
    return torch.int16 if device.type == "cpu" and dtype.itemsize == 2 else dtype


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Memory of one block over all layers: keys, values and their scales."""
    per_token = config.kv_size * dtype.itemsize
    if not dtype.is_floating_point:
        per_token += config.num_kv_heads * torch.float32.itemsize
    return 2 * config.num_layers * block_size * per_token


def allocate_kv_cache(
    config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[LayerCache]:
    """One zeroed ``LayerCache`` per layer. Zeroed, for a masked key must not be a NaN.

    Raises:
        ValueError: an int8 cache on a GPU.
    """
    shapes = kernels.kv_cache_shapes(device, num_blocks, block_size, config.num_kv_heads, config.head_dim, dtype)
    scales: list[tuple[int, ...]] = []
    if not dtype.is_floating_point:
        if device.type != "cpu":
            raise ValueError(f"kv_cache_dtype int8 is not supported on {device.type}; leave it at 'auto'")
        scales = [(num_blocks, config.num_kv_heads, block_size)] * 2
    allocate = _side_by_side if device.type == "cpu" else _apart
    return [
        LayerCache(*allocate(shapes, dtype, device), *_apart(scales, torch.float32, device))
        for _ in range(config.num_layers)
    ]


def copy_blocks(kv_cache: Sequence[LayerCache], pairs: Sequence[tuple[int, int]]) -> None:
    """Copy whole blocks, (source, destination) each, in every layer: sequences that part ways need a last block each.

    All sources are read before a destination is written.
    """
    device = kv_cache[0].keys.device
    sources, destinations = to_device(torch.tensor(pairs, dtype=torch.int64), device).view(-1, 2).unbind(1)
    for layer in kv_cache:
        for tensor in layer:
            if tensor is not None:
                tensor.index_copy_(0, destinations, tensor.index_select(0, sources))


def _apart(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [_zeros(shape, dtype, device) for shape in shapes]


def _side_by_side(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """A block's keys and values next to each other: memory is read the faster, the longer the stretch."""
    ends = list(accumulate((math.prod(shape[1:]) for shape in shapes), initial=0))
    whole = _zeros((shapes[0][0], ends[-1]), dtype, device)
    return [whole[:, start:end].view(shape) for (start, end), shape in zip(pairwise(ends), shapes, strict=True)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU through numpy, whose zeros are pages that take no time and no memory before they are touched."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
