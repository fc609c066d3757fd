"""The CPU operations that read or write the KV cache, through the native library; promises as in ``native``."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenrelay.model.transformer.kernels import library, reference
from tokenrelay.model.transformer.kernels.reference_attention import LANES

MAX_HEAD_DIM = 256
CACHE_TYPES = {torch.float32: 0, torch.int16: 1, torch.int8: 2}


def describe_cache(
    head_dim: int,
    k_cache: Tensor,
    v_cache: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> library.KVCache | None:
    """The cache as the kernels see it; None if they do not cover it."""
    _, num_kv_heads, _, block_size = k_cache.shape[:4]
    dtype = k_cache.dtype
    covered = head_dim <= MAX_HEAD_DIM and block_size % LANES == 0 and dtype in CACHE_TYPES
    if not covered:
        return None
    return library.KVCache(
        _address_of_blocks(k_cache, dtype),
        _address_of_blocks(v_cache, dtype),
        library.address(key_scales, torch.float32),
        library.address(value_scales, torch.float32),
        k_cache.stride(0),
        v_cache.stride(0),
        num_kv_heads,
        head_dim,
        block_size,
        CACHE_TYPES[dtype],
    )


def _address_of_blocks(cache: Tensor, dtype: torch.dtype) -> int:
    """Each block must be dense; something else may lie between them."""
    library.address(cache[0], dtype)
    return cache.data_ptr()


def head_norm(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, num_heads: int, num_kv_heads: int, eps: float) -> None:
    if qkv.dtype is not torch.float32:
        return reference.head_norm(qkv, q_weight, k_weight, num_heads, num_kv_heads, eps)
    head_dim = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    q_weight, k_weight = q_weight.float(), k_weight.float()
    library.head_norm(
        library.HeadNormParams(
            library.address(qkv, torch.float32),
            library.address(q_weight, torch.float32),
            library.address(k_weight, torch.float32),
            qkv.shape[0],
            num_heads * head_dim,
            num_kv_heads * head_dim,
            len(q_weight),
            len(k_weight),
            eps,
        )
    )
    return None


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
    qkv = qkv.contiguous()
    head_dim = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    cache = describe_cache(head_dim, k_cache, v_cache, key_scales, value_scales)
    if cache is None or qkv.dtype is not torch.float32:
        return reference.rotate_and_cache(
            qkv, positions, cos_sin, k_cache, v_cache, slot_mapping, num_heads, num_kv_heads, key_scales, value_scales
        )
    q = qkv.new_empty((qkv.shape[0], num_heads, head_dim))
    library.rotate_and_cache(
        library.RotateParams(
            cache,
            qkv.data_ptr(),
            library.address(positions, torch.int64),
            library.address(cos_sin, torch.float32),
            library.address(slot_mapping, torch.int64),
            q.data_ptr(),
            qkv.shape[0],
            num_heads,
            0 if cos_sin is None else cos_sin.shape[1],
        )
    )
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
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    q = q.contiguous()
    rows, num_heads, head_dim = q.shape
    cache = describe_cache(head_dim, k_cache, v_cache, key_scales, value_scales)
    if cache is None or q.dtype is not torch.float32:
        return reference.paged_attention(
            *(q, k_cache, v_cache, block_tables, query_start_loc, seq_lens, scale),
            *(window, num_sinks, q_sink, key_scales, value_scales, softcap, sink_logits),
        )
    out = q.new_empty((rows, num_heads * head_dim))
    library.paged_attention(
        library.AttentionParams(
            cache,
            q.data_ptr(),
            library.address(q_sink, torch.float32),
            library.address(block_tables, torch.int32),
            library.address(query_start_loc, torch.int32),
            library.address(seq_lens, torch.int32),
            library.address(sink_logits, torch.float32),
            out.data_ptr(),
            *block_tables.shape,
            num_heads,
            window,
            num_sinks,
            scale,
            softcap,
        )
    )
    return out
