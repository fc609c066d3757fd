"""How many KV blocks a GPU has room for: arithmetic over what a step was seen to take. No torch."""

from __future__ import annotations

from typing import NamedTuple

SPARE_BLOCKS = 1  # CUDA's cache has one more, for the tokens of padding


class MemoryUsage(NamedTuple):
    """Bytes of a device, measured with the weights loaded and no KV cache."""

    total: int
    free: int  # nobody's: neither this process's nor another's
    activations: int  # what the largest step takes for its duration


def kv_cache_blocks(memory: MemoryUsage, utilization: float, bytes_per_block: int, *, with_graphs: bool) -> int:
    """Blocks that fit into ``utilization`` of the whole device beside all that is there already.

    Captured graphs keep activations of their own, at most as large.

    Raises:
        ValueError: not even one does.
    """
    activations = memory.activations * (2 if with_graphs else 1)
    used = memory.total - memory.free
    room = int(memory.total * utilization) - used - activations
    num_blocks = room // bytes_per_block - SPARE_BLOCKS
    if num_blocks < 1:
        raise ValueError(
            f"gpu_memory_utilization {utilization} leaves no room for a KV cache: of {_mib(memory.total)} are "
            f"{_mib(used)} in use, and a step takes {_mib(activations)}. Raise it, lower max_num_batched_tokens or "
            "max_num_seqs, or quantize the weights"
        )
    return num_blocks


def _mib(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB"
