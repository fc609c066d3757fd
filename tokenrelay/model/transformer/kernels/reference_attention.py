"""The operations that read or write the KV cache, in plain torch; promises as in ``reference``.

The cache's layout is the CPU's: ``k_cache[block, KV, D, slot]`` and ``v_cache[block, KV, slot, D']`` with D' = D
rounded up to 16. Integers lie in pairs, as products of integers take them: ``k_cache[block, KV, D / 2, slot, 2]``, two
elements of a key, and ``v_cache[block, KV, slot / 2, D', 2]``, one of each of two values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 16  # of a vector
BLOCK_SIZE = LANES  # keys, at least
LARGEST_CACHED = {torch.int16: 8191, torch.int8: 127}
CHUNK = 64  # keys whose weights are rounded together


def kv_cache_shapes(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """K: keys innermost, so that 16 scores are one vector. V: head size rounded up to whole vectors."""
    padded = -(-head_dim // LANES) * LANES
    heads = num_blocks, num_kv_heads
    if dtype in LARGEST_CACHED:
        return (*heads, -(-head_dim // 2), block_size, 2), (*heads, block_size // 2, padded, 2)
    return (*heads, head_dim, block_size), (*heads, block_size, padded)


def rotate(x: Tensor, positions: Tensor, cos_sin: Tensor | None) -> Tensor:
    """NeoX rotation of x[T, heads, D] by cos_sin[positions, R]: of the first R elements i turns with i + R/2."""
    if cos_sin is None:
        return x
    turning, still = torch.split(x, [cos_sin.shape[1], x.shape[-1] - cos_sin.shape[1]], dim=-1)
    cosine, sine = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)  # [T, 1, R/2] each
    first, second = turning.float().chunk(2, dim=-1)
    turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)
    return torch.cat((turned, still), dim=-1)


def split_and_rotate(
    qkv: Tensor, positions: Tensor, cos_sin: Tensor | None, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv[T, (H + 2 KV) D] -> q[T, H, D], k[T, KV, D], both rotated, and v[T, KV, D]."""
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, -1)
    q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    return rotate(q, positions, cos_sin).contiguous(), rotate(k, positions, cos_sin), v


def quantize(x: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """x [..., D] -> integers [..., D] as fp32, scales [...]: max |x| / largest. NaN and infinity live on in them."""
    highest = x.float().abs().amax(-1)
    scales = torch.where(highest < 1e-34, 0.0, highest / largest)
    usable = ((scales > 0) & highest.isfinite()).unsqueeze(-1)
    steps = (x.float() * (largest / highest).unsqueeze(-1)).round()  # ties to even
    return torch.where(usable, steps, 0.0), scales


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
    q, k, v = split_and_rotate(qkv, positions, cos_sin, num_heads, num_kv_heads)
    written = slot_mapping >= 0
    block_size = k_cache.shape[3]
    block, offset = slot_mapping[written] // block_size, slot_mapping[written] % block_size
    k, v = k[written], v[written]
    if key_scales is not None and value_scales is not None:
        largest = LARGEST_CACHED[k_cache.dtype]
        k, key_scales[block, :, offset] = quantize(k, largest)
        v, value_scales[block, :, offset] = quantize(v, largest)
        k = F.pad(k, (0, k.shape[-1] % 2)).view(*k.shape[:2], -1, 2)
        v_cache[block, :, offset // 2, : v.shape[-1], offset % 2] = v.to(v_cache.dtype)
    else:
        v_cache[block, :, offset, : v.shape[-1]] = v.to(v_cache.dtype)
    k_cache[block, :, :, offset] = k.to(k_cache.dtype)
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
    (num_tokens, num_heads, head_dim), block_size = q.shape, k_cache.shape[3]
    group = num_heads // k_cache.shape[1]
    out = torch.empty_like(q)
    starts = query_start_loc.tolist()
    queries = _rounded(q * scale, k_cache.dtype, head_dim)
    sink_queries = None if q_sink is None else _rounded(q_sink * scale, k_cache.dtype, head_dim)
    for request, seq_len in enumerate(seq_lens.tolist()):
        rows = slice(starts[request], starts[request + 1])
        positions = torch.arange(seq_len - (rows.stop - rows.start), seq_len, device=q.device)
        seen, as_sink = visible_keys(positions, window, num_sinks)
        key = seen.any(0).nonzero().squeeze(1)  # what nobody sees may have been freed: it is not read
        block, offset = block_tables[request, key // block_size].long(), key % block_size
        k, v = k_cache[block, :, :, offset], _values(v_cache, block, offset)
        k, v = (_for_query_heads(x.flatten(2)[..., :head_dim].to(q.dtype), group) for x in (k, v))
        if key_scales is not None:
            k = k * _for_query_heads(key_scales[block, :, offset].unsqueeze(-1), group)
        scores = queries[rows].transpose(0, 1) @ k.transpose(1, 2)  # [H, queries, keys]
        if sink_queries is not None:
            scores = scores.where(~as_sink[:, key], sink_queries[rows].transpose(0, 1) @ k.transpose(1, 2))
        scores = _capped(scores, softcap).masked_fill(~seen[:, key], float("-inf"))
        weights = _softmax(scores, sink_logits)
        if value_scales is not None:
            scales = _for_query_heads(value_scales[block, :, offset].unsqueeze(-1), group).transpose(1, 2)
            passes = as_sink[:, key], (seen & ~as_sink)[:, key]
            rounded = (_rounded_by_chunk(weights, scales, taken, key, v_cache.dtype) for taken in passes)
            weights = torch.add(*rounded)
        out[rows] = (weights @ v).transpose(0, 1)
    return out.view(num_tokens, num_heads * head_dim)


def _values(v_cache: Tensor, block: Tensor, offset: Tensor) -> Tensor:
    return v_cache[block, :, offset] if v_cache.dim() == 4 else v_cache[block, :, offset // 2, :, offset % 2]


def _for_query_heads(stored: Tensor, group: int) -> Tensor:
    """[keys, KV, n] -> [H, keys, n]"""
    return stored.repeat_interleave(group, dim=1).transpose(0, 1)


def _rounded(x: Tensor, cached: torch.dtype, n: int) -> Tensor:
    """x [..., n] as it is multiplied with a cache of integers: in as many bits as keep sums of n within 32."""
    if cached not in LARGEST_CACHED:
        return x
    integers, scales = quantize(x, _largest_factor(cached, n))
    return integers * scales.unsqueeze(-1)


def _largest_factor(cached: torch.dtype, n: int) -> int:
    return min(32767, (2**31 - 1) // (LARGEST_CACHED[cached] * n))


def _rounded_by_chunk(weights: Tensor, scales: Tensor, seen: Tensor, key: Tensor, cached: torch.dtype) -> Tensor:
    """weights [H, queries, keys] times scales [H, 1, keys] of the keys at these positions, as far as they are seen.

    A chunk's largest weight times its largest scale becomes the largest integer.
    """
    end = (int(key[-1]) // CHUNK + 1) * CHUNK

    def chunks(x: Tensor) -> Tensor:
        whole = weights.new_zeros((*weights.shape[:2], end))
        return whole.index_copy_(2, key, x.expand_as(weights).where(seen, 0.0)).view(*whole.shape[:2], -1, CHUNK)

    parts, factors = chunks(weights), chunks(scales)
    step = parts.amax(-1, keepdim=True) * factors.amax(-1, keepdim=True) / _largest_factor(cached, CHUNK)
    steps = torch.where(step == 0, 0.0, (parts * factors / step).round())
    return (steps * step).flatten(2).index_select(2, key)


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return softcap * (scores / softcap).tanh() if softcap else scores


def _softmax(scores: Tensor, sink_logits: Tensor | None) -> Tensor:
    """Over the keys, [H, queries, keys]; a head's sink takes its share and is left out."""
    if sink_logits is None:
        return scores.softmax(-1)
    sinks = sink_logits.to(scores.dtype).view(-1, 1, 1).expand(-1, scores.shape[1], 1)
    return torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]


def visible_keys(queries: Tensor, window: int, num_sinks: int) -> tuple[Tensor, Tensor]:
    """Which keys the queries at these ascending positions see, and which of them as sinks: bool [queries, keys]."""
    query, key = queries.unsqueeze(1), torch.arange(int(queries[-1]) + 1, device=queries.device)
    beyond = (query >= num_sinks + window) & (window > 0)  # positions whose window has left the sinks behind
    as_sink = beyond & (key < num_sinks)
    recent = ~beyond | (key > query - window)
    return as_sink | (recent & (key <= query)), as_sink
