"""The GPU's operations: torch's paged FlashAttention, its cache layout, and the torch reference for the rest.

Checked under FakeTensorMode only: shapes, dtypes, devices and signatures, no values. Nothing here waits for the device.
The cache is ``[blocks + 1, block_size, KV, D]`` for K and V alike; the spare last block takes what is written to
negative slots (padding of a captured graph), so that no shape depends on data.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from tokenrelay.model.quantized import GROUP
from tokenrelay.model.transformer.kernels import reference


def kv_cache_shapes(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape = (num_blocks + 1, block_size, num_kv_heads, head_dim)
    return shape, shape


def rotate_and_cache(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    num_kv_heads: int,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    _refuse(int8=key_scales is not None)
    q, k, v = reference.split_and_rotate(qkv, positions, cos_sin, num_heads, num_kv_heads)
    spare = k_cache.shape[0] * k_cache.shape[1] - 1
    slots = torch.where(slot_mapping < 0, spare, slot_mapping)
    k_cache.flatten(0, 1).index_copy_(0, slots, k.to(k_cache.dtype))
    v_cache.flatten(0, 1).index_copy_(0, slots, v.to(v_cache.dtype))
    return q


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int = 0,
    num_sinks: int = 0,
    q_sink: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    _refuse(int8=key_scales is not None, sinks=num_sinks > 0)
    out = varlen_attn(
        q,
        k_cache,
        v_cache,
        query_start_loc,
        None,
        max_q=q.shape[0],  # upper bounds known without asking the device
        max_k=block_tables.shape[1] * k_cache.shape[1],
        scale=scale,
        window_size=(window - 1, 0),  # keys before the query, or -1: all, and none after it; aligned to the last key
        enable_gqa=True,
        seqused_k=seq_lens,
        block_table=block_tables,
        num_splits=1,  # a split would depend on the longest request of the batch
    )
    assert isinstance(out, Tensor)  # a tuple only when auxiliary results are asked for
    return out.flatten(1)


def quantized_linear(
    x: Tensor, panels: Tensor, scales: Tensor, minima: Tensor | None, bias: Tensor | None, out_features: int
) -> Tensor:
    """Activations are not rounded: the weights are widened at every call, which saves memory, not time."""
    integers = reference.unpack_integers(panels, out_features, 8 if minima is None else 4).to(x.dtype)
    weight = integers.view(out_features, -1, GROUP) * reference.unpack(scales, out_features).to(x.dtype).unsqueeze(-1)
    if minima is not None:
        weight += reference.unpack(minima, out_features).to(x.dtype).unsqueeze(-1)
    return F.linear(x, weight.flatten(1), bias)


def _refuse(*, int8: bool = False, sinks: bool = False) -> None:
    if int8:
        raise ValueError("an int8 KV cache is not supported on CUDA; use bfloat16, float16 or float32")
    if sinks:
        raise ValueError("attention sinks are not supported on CUDA; set attention_sinks to 0 or run on the CPU")
