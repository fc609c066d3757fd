"""Grouped-query attention over the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.transformer import kernels
from tokenrelay.model.transformer.kv_cache import LayerCache
from tokenrelay.model.transformer.layers import RMSNorm


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where the T tokens of a step belong: B requests, flattened one after the other."""

    slot_mapping: Tensor  # [T] int64: cache slot each token's key and value are written to
    block_tables: Tensor  # [B, M] int32: block numbers of each request, padded
    query_start_loc: Tensor  # [B + 1] int32: first row of each request, and T
    seq_lens: Tensor  # [B] int32: tokens of each request so far, those of this step included
    num_results: Tensor | None = None  # [B] int32: rows at a request's end whose results are asked for; None: all
    sink_positions: Tensor | None = None  # [T] int64: where each query stands to the attention sinks; see Attention


class Attention(nn.Module):
    """Project, rotate and cache, attend, project out. (Vaswani et al. 2017; groups: Ainslie et al. 2023)

    With a ``window`` a token sees itself and the ``window`` - 1 tokens before it; with ``num_sinks`` also the first
    tokens of its request (attention sinks, StreamingLLM, Xiao et al. 2023), so that a text may outgrow the length the
    network was trained on. What counts for the network is then a token's place among the keys it sees, not in the
    text: from position num_sinks + window on every query stands at num_sinks + window - 1. The distance to a key
    inside the window is the same either way. Only the distance to a sink would grow with the text, so for the sinks,
    and for them alone, the query is rotated a second time, to that fixed place (``AttentionMetadata.sink_positions``).
    No key is ever rotated again: the cache holds it as it was written, and may share its blocks.

    ``sinks`` are another remedy for the same need: a learned logit per head, which takes part in its softmax.
    """

    def __init__(self, config: ModelConfig, window: int = 0, num_sinks: int = 0) -> None:
        """A ``window`` of 0 shows all tokens."""
        super().__init__()
        width = config.q_size + 2 * config.kv_size
        self.qkv_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.o_proj = nn.Linear(config.q_size, config.hidden_size, bias=config.output_bias)
        self.q_norm, self.k_norm = _query_and_key_norms(config)
        self.sinks = nn.Parameter(torch.empty(config.num_heads)) if config.learned_sinks else None
        self._num_heads, self._num_kv_heads = config.num_heads, config.num_kv_heads
        self.scale, self._softcap = config.attention_scale or config.head_dim**-0.5, config.attention_softcap
        self.window, self.num_sinks = window, num_sinks

    def forward(
        self, x: Tensor, positions: Tensor, rotary: Tensor | None, cache: LayerCache, metadata: AttentionMetadata
    ) -> Tensor:
        """x [T, C] → [T, C]; writes the keys and values of the T tokens to the cache."""
        qkv = self.qkv_proj(x)
        if self.q_norm is not None and self.k_norm is not None:
            weights = self.q_norm.weight, self.k_norm.weight
            kernels.head_norm(qkv, *weights, self._num_heads, self._num_kv_heads, self.q_norm.eps)
        q = self._rotate(qkv, positions, rotary, cache, metadata.slot_mapping)
        q_sink = None
        if metadata.sink_positions is not None:
            nowhere = torch.full_like(metadata.slot_mapping, -1)
            q_sink = self._rotate(qkv, metadata.sink_positions, rotary, cache, nowhere)
        attended = kernels.paged_attention(
            q,
            cache.keys,
            cache.values,
            metadata.block_tables,
            metadata.query_start_loc,
            metadata.seq_lens,
            self.scale,
            self.window,
            self.num_sinks,
            q_sink,
            cache.key_scales,
            cache.value_scales,
            self._softcap,
            self.sinks,
        )
        out: Tensor = self.o_proj(attended)
        return out

    def _rotate(
        self, qkv: Tensor, positions: Tensor, rotary: Tensor | None, cache: LayerCache, slot_mapping: Tensor
    ) -> Tensor:
        """The queries [T, H, D] at these positions; keys and values go to their slots."""
        return kernels.rotate_and_cache(
            qkv,
            positions,
            rotary,
            cache.keys,
            cache.values,
            slot_mapping,
            self._num_heads,
            self._num_kv_heads,
            cache.key_scales,
            cache.value_scales,
        )


def _query_and_key_norms(config: ModelConfig) -> tuple[RMSNorm | None, RMSNorm | None]:
    """Of each head by itself, with one weight for all (Henry et al. 2020); or of all heads as one vector."""
    if not config.qk_norm:
        return None, None
    sizes = (config.head_dim, config.head_dim) if config.qk_norm == "head" else (config.q_size, config.kv_size)
    return RMSNorm(sizes[0], config.norm_eps), RMSNorm(sizes[1], config.norm_eps)
