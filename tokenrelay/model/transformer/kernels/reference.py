"""Every operation in plain torch: obviously right, on any device, and the fallback where the native library is missing.

Promises the values, not the bits: torch's own matrix product may depend on the number of rows. Shapes are in the
package's docstring; the cache layout here is the CPU's: ``k_cache[block, KV, D, slot]`` and
``v_cache[block, KV, slot, D']`` with D' = D rounded up to 16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL_WIDTH = 16

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def kv_cache_shapes(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """K: keys innermost, so that 16 scores are one vector. V: head size rounded up to whole vectors."""
    padded = -(-head_dim // PANEL_WIDTH) * PANEL_WIDTH
    return (num_blocks, num_kv_heads, head_dim, block_size), (num_blocks, num_kv_heads, block_size, padded)


def pack(weight: Tensor) -> Tensor:
    """[N, K] -> panels [ceil(N / 16), K, 16], the last one padded with zero columns."""
    out_features, in_features = weight.shape
    padded = F.pad(weight, (0, 0, 0, -out_features % PANEL_WIDTH))
    return padded.view(-1, PANEL_WIDTH, in_features).transpose(1, 2).contiguous()


def unpack(panels: Tensor, out_features: int) -> Tensor:
    """The inverse of ``pack``."""
    return panels.transpose(1, 2).reshape(-1, panels.shape[1])[:out_features]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    plain = unpack(weight, out_features) if weight.dim() == 3 else weight
    return F.linear(x, plain.to(x.dtype), None if bias is None else bias.to(x.dtype))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(residual.add_(x), weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x.float(), (x.shape[-1],), weight.float(), None if bias is None else bias.float(), eps).to(
        x.dtype
    )


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return layer_norm(residual.add_(x), weight, bias, eps)


def rotate(x: Tensor, positions: Tensor, cos_sin: Tensor | None) -> Tensor:
    """NeoX rotation of x[T, heads, D]: element i turns with element i + D/2."""
    if cos_sin is None:
        return x
    cosine, sine = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)  # [T, 1, D/2] each
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)


def split_and_rotate(
    qkv: Tensor, positions: Tensor, cos_sin: Tensor | None, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv[T, (H + 2 KV) D] -> q[T, H, D], k[T, KV, D], both rotated, and v[T, KV, D]."""
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, -1)
    q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    return rotate(q, positions, cos_sin).contiguous(), rotate(k, positions, cos_sin), v


def rotate_and_cache(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    q, k, v = split_and_rotate(qkv, positions, cos_sin, num_heads, num_kv_heads)
    written = slot_mapping >= 0
    block_size = k_cache.shape[3]
    block, offset = slot_mapping[written] // block_size, slot_mapping[written] % block_size
    k_cache[block, :, :, offset] = k[written].to(k_cache.dtype)
    v_cache[block, :, offset, : v.shape[-1]] = v[written].to(v_cache.dtype)
    return q


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> Tensor:
    num_tokens, num_heads, head_dim = q.shape
    group = num_heads // k_cache.shape[1]
    out = torch.empty_like(q)
    starts = query_start_loc.tolist()
    for request, seq_len in enumerate(seq_lens.tolist()):
        begin, end = starts[request], starts[request + 1]
        blocks = block_tables[request, : -(-seq_len // k_cache.shape[3])].long()
        k = k_cache[blocks].permute(0, 3, 1, 2).flatten(0, 1)[:seq_len]  # [keys, KV, D]
        v = v_cache[blocks].permute(0, 2, 1, 3).flatten(0, 1)[:seq_len, :, :head_dim]
        k, v = (t.to(q.dtype).repeat_interleave(group, dim=1).transpose(0, 1) for t in (k, v))
        scores = q[begin:end].transpose(0, 1) @ k.transpose(1, 2) * scale  # [H, queries, keys]
        position = torch.arange(seq_len - (end - begin), seq_len, device=q.device)
        hidden = torch.arange(seq_len, device=q.device) > position.unsqueeze(1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[begin:end] = (weights @ v).transpose(0, 1)
    return out.view(num_tokens, num_heads * head_dim)


def activation(x: Tensor, kind: str) -> Tensor:
    return ACTIVATIONS[kind](x)


def gated_activation(x: Tensor, kind: str) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return ACTIVATIONS[kind](gate) * up
