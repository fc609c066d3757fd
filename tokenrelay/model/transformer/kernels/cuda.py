"""The GPU's operations: torch's paged FlashAttention, its cache layout, and the torch reference for the rest.

Never run on a GPU: shapes, types, devices and signatures are checked on fake tensors, values on a CPU with a stand-in
for FlashAttention. Nothing here waits for the device. The cache is ``[blocks + 1, block_size, KV, D]`` for K and V
alike; the spare last block takes what is written to negative slots (padding of a captured graph), so that no shape
depends on data.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from tokenrelay.model.quantized import GROUP
from tokenrelay.model.transformer.kernels import gathered, reference, reference_attention

BLOCK_SIZE = 256  # FlashAttention 2 refuses pages that are not a multiple of it
FLASH_HEAD_DIMS = range(8, 257, 8)


def kv_cache_shapes(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
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
    q, k, v = reference_attention.split_and_rotate(qkv, positions, cos_sin, num_heads, num_kv_heads)
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
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    _refuse(int8=key_scales is not None, sinks=num_sinks > 0)
    index = (block_tables, query_start_loc, seq_lens)
    if softcap or not _flash_takes(q, k_cache):
        return gathered.paged_attention(q, k_cache, v_cache, *index, scale, window, softcap, sink_logits)
    out, logsumexp = _flash(q, k_cache, v_cache, *index, scale, window)
    if sink_logits is not None:  # one more logit in the sum: what it takes is missing in all weights alike
        share = (logsumexp - sink_logits.unsqueeze(1)).sigmoid()  # [H, T], whatever varlen_attn's docstring says
        out = (out * share.T.unsqueeze(2)).to(out.dtype)
    return out.flatten(1)


def _flash(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """What is attended to [T, H, D], and the logarithm of the sum of every row's weights."""
    return varlen_attn(  # type: ignore[return-value]
        q,
        k_cache,
        v_cache,
        query_start_loc,
        query_start_loc,  # of the keys: demanded, and not read when there are pages
        max_q=q.shape[0],  # upper bounds known without asking the device
        max_k=block_tables.shape[1] * k_cache.shape[1],
        return_aux=AuxRequest(lse=True),
        scale=scale,
        window_size=(window - 1, 0),  # keys before the query, or -1: all, and none after it; aligned to the last key
        enable_gqa=True,
        seqused_k=seq_lens,
        block_table=block_tables,
        num_splits=1,  # a split would depend on the longest request; and with pages it is wrong (pytorch #194167)
    )


def _flash_takes(q: Tensor, k_cache: Tensor) -> bool:
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] in FLASH_HEAD_DIMS
        and k_cache.shape[1] % BLOCK_SIZE == 0
        and _has_flash()
    )


@cache
def _has_flash() -> bool:
    """From Ampere on. Where no GPU is, as in the tests, one is assumed."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)


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
