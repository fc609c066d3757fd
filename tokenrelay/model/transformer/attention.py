"""Grouped-query attention over the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.transformer import kernels
from tokenrelay.model.transformer.kv_cache import LayerCache


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where the T tokens of a step belong: B requests, flattened one after the other."""

    slot_mapping: Tensor  # [T] int64: cache slot each token's key and value are written to
    block_tables: Tensor  # [B, M] int32: block numbers of each request, padded
    query_start_loc: Tensor  # [B + 1] int32: first row of each request, and T
    seq_lens: Tensor  # [B] int32: tokens each request can see, those of this step included


class Attention(nn.Module):
    """Project, rotate and cache, attend, project out. (Vaswani et al. 2017; groups: Ainslie et al. 2023)"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.q_size + 2 * config.kv_size
        self.qkv_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.o_proj = nn.Linear(config.q_size, config.hidden_size, bias=config.output_bias)
        self._num_heads, self._num_kv_heads = config.num_heads, config.num_kv_heads
        self._scale = config.head_dim**-0.5

    def forward(
        self, x: Tensor, positions: Tensor, rotary: Tensor | None, cache: LayerCache, metadata: AttentionMetadata
    ) -> Tensor:
        """x [T, C] → [T, C]; writes the keys and values of the T tokens to the cache."""
        q = kernels.rotate_and_cache(
            self.qkv_proj(x),
            positions,
            rotary,
            cache.keys,
            cache.values,
            metadata.slot_mapping,
            self._num_heads,
            self._num_kv_heads,
        )
        attended = kernels.paged_attention(
            q,
            cache.keys,
            cache.values,
            metadata.block_tables,
            metadata.query_start_loc,
            metadata.seq_lens,
            self._scale,
        )
        out: Tensor = self.o_proj(attended)
        return out
