"""Paged attention in plain torch, for what FlashAttention does not do: score caps, fp32, odd head sizes, older GPUs.

No shape depends on data and nothing waits for the device, so a CUDA graph may hold it. For a few rows at a time it
gathers a few blocks of keys at a time, and the softmax runs along. (online softmax, Milakov & Gimelshein 2018) What a
row is computed from, and in which order, depends on its position alone. The cache is laid out as in ``cuda``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_AT_ONCE, BLOCKS_AT_ONCE = 16, 4  # what is gathered: 64 blocks, whose keys are then fp32
NOTHING = -1e30  # a logit below all others, finite: the difference of two of them is a number


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """As ``kernels.paged_attention``, for a cache [blocks, block_size, KV, D]."""
    row = torch.arange(q.shape[0], dtype=query_start_loc.dtype, device=q.device)
    request = torch.searchsorted(query_start_loc, row, right=True) - 1
    position = seq_lens[request] - (query_start_loc[request + 1] - row)
    tables = F.pad(block_tables, (0, -block_tables.shape[1] % BLOCKS_AT_ONCE))[request]  # slices of one size
    chunks = zip(*(torch.split(x, ROWS_AT_ONCE) for x in (q, position, tables)), strict=True)
    seen = (k_cache, v_cache, scale, window, softcap, sink_logits)
    return torch.cat([_attend(rows, at, table, *seen) for rows, at, table in chunks]).flatten(1)


def _attend(
    q: Tensor,
    position: Tensor,
    tables: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sink_logits: Tensor | None,
) -> Tensor:
    """q [t, H, D] at their positions [t], each with its table [t, M] -> [t, H, D]."""
    block_size, num_kv_heads = k_cache.shape[1:3]
    queries = q.float().view(len(q), num_kv_heads, -1, q.shape[2]) * scale  # [t, KV, G, D]
    largest, total = _first_logits(queries, sink_logits)
    attended = torch.zeros_like(queries)
    for first in range(0, tables.shape[1], BLOCKS_AT_ONCE):
        blocks = tables[:, first : first + BLOCKS_AT_ONCE]
        key = torch.arange(blocks.shape[1] * block_size, device=q.device) + first * block_size
        seen = _sees(position.unsqueeze(1), key, window)  # [t, keys]
        scores = torch.einsum("tkgd,tskd->tkgs", queries, k_cache[blocks].flatten(1, 2).float())
        scores = softcap * (scores / softcap).tanh() if softcap else scores
        scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
        values = v_cache[blocks].flatten(1, 2).float().masked_fill(~seen[:, :, None, None], 0.0)  # may be another's NaN
        before, largest = largest, torch.maximum(largest, scores.amax(-1, keepdim=True))
        weights, shrunk = (scores - largest).exp(), (before - largest).exp()
        total = total * shrunk + weights.sum(-1, keepdim=True)
        attended = attended * shrunk + torch.einsum("tkgs,tskd->tkgd", weights, values)
    return (attended / total).flatten(1, 2).to(q.dtype)


def _first_logits(queries: Tensor, sink_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """The largest logit so far and the sum of weights relative to it, [t, KV, G, 1]: a sink's, or none."""
    shape = (*queries.shape[:3], 1)
    if sink_logits is None:
        return queries.new_full(shape, NOTHING), queries.new_zeros(shape)
    return sink_logits.float().view(1, *shape[1:]).expand(shape), queries.new_ones(shape)


def _sees(position: Tensor, key: Tensor, window: int) -> Tensor:
    causal = key <= position
    return causal & (key > position - window) if window else causal
