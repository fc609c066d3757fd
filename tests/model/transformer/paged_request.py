"""One request of random queries, keys and values, whose blocks lie in a cache out of order."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenrelay.model.transformer import kernels
from tokenrelay.model.transformer.kernels.reference_attention import LARGEST_CACHED
from tokenrelay.model.transformer.kv_cache import LayerCache

BLOCK = 16


def cpu_cache(
    blocks: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32, block_size: int = BLOCK
) -> LayerCache:
    """A cache of random content: what a kernel must not read, it would show."""
    shapes = kernels.kv_cache_shapes(torch.device("cpu"), blocks, block_size, kv_heads, head_dim, dtype)
    if dtype.is_floating_point:
        return LayerCache(*(torch.randn(shape).to(dtype) for shape in shapes))
    largest = LARGEST_CACHED[dtype]
    elements = (torch.randint(-largest, largest + 1, shape).to(dtype) for shape in shapes)
    return LayerCache(*elements, *(torch.rand(2, blocks, kv_heads, block_size) * 2 / largest))


def rotary_angles(length: int, head_dim: int) -> Tensor:
    """cos, then sin, of every position's angles: [length, head_dim]."""
    angles = torch.outer(torch.arange(length).float(), torch.logspace(0, -2, head_dim // 2))
    return torch.cat((angles.cos(), angles.sin()), dim=1)


class PagedRequest:
    """Its tokens are computed step by step with ``forward``; ``free`` takes blocks away as the engine does."""

    def __init__(
        self,
        length: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        window: int = 0,
        num_sinks: int = 0,
    ) -> None:
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.window, self.num_sinks = window, num_sinks
        self.qkv = torch.randn(length, (heads + 2 * kv_heads) * head_dim)
        blocks = -(-length // BLOCK)
        self.table = torch.randperm(blocks + 3)[:blocks].to(torch.int32)
        self.softcap = 0.0
        self.sink_logits: Tensor | None = None
        self.cos_sin: Tensor | None = rotary_angles(length, head_dim)
        self.cache = cpu_cache(blocks + 3, kv_heads, head_dim, dtype)

    def rotate_and_cache(self, positions: Tensor, rotated_to: Tensor, slots: Tensor) -> Tensor:
        keys, values, *scales = self.cache
        qkv, heads = self.qkv[positions], (self.heads, self.kv_heads)
        return kernels.rotate_and_cache(qkv, rotated_to, self.cos_sin, keys, values, slots, *heads, *scales)

    def forward(self, begin: int, end: int) -> Tensor:
        """Rotate, cache and attend for the tokens [begin, end), as one step of the engine."""
        positions = torch.arange(begin, end)
        slots = self.table[positions // BLOCK].long() * BLOCK + positions % BLOCK
        q, q_sink = self.rotate_and_cache(positions, positions, slots), None
        last = self.num_sinks + self.window - 1
        if self.num_sinks and end - 1 > last:
            q_sink = self.rotate_and_cache(positions, positions.clamp(max=last), torch.full_like(slots, -1))
        keys, values, *scales = self.cache
        index = self.table.unsqueeze(0), torch.tensor([0, end - begin]).int(), torch.tensor([end]).int()
        seen = self.head_dim**-0.5, self.window, self.num_sinks, q_sink, *scales, self.softcap, self.sink_logits
        return kernels.paged_attention(q, keys, values, *index, *seen)

    def forward_in_chunks(self, chunk: int, *, free: bool = False) -> Tensor:
        """The whole request; with ``free``, blocks that no later token sees are another's after every step."""
        length, out = len(self.qkv), []
        for begin in range(0, length, chunk):
            out.append(self.forward(begin, min(begin + chunk, length)))
            if free:
                self.free(min(begin + chunk, length))
        return torch.cat(out)

    def free(self, num_computed: int) -> None:
        """What falls out of the next token's window is overwritten with NaN, and its place in the table with 0."""
        for index in range(-(-self.num_sinks // BLOCK), max(0, num_computed - self.window + 1) // BLOCK):
            for tensor in self.cache:
                if tensor is not None and self.table[index] > 0:
                    tensor[self.table[index]] = float("nan") if tensor.is_floating_point() else 77
            self.table[index] = 0
