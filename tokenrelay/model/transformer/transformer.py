"""The decoder. Its switches are in ``ModelConfig``; devices, quantization and fusion are in what it calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.transformer.attention import Attention, AttentionMetadata
from tokenrelay.model.transformer.kv_cache import LayerCache
from tokenrelay.model.transformer.layers import MLP, make_norm


class DecoderLayer(nn.Module):
    """Pre-norm block: x + attention(norm x), then x + mlp(norm x); the additions happen inside the norms."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        positions: Tensor,
        rotary: Tensor | None,
        cache: LayerCache,
        metadata: AttentionMetadata,
    ) -> Tensor:
        attended = self.attention(self.attention_norm(x, residual), positions, rotary, cache, metadata)
        hidden: Tensor = self.mlp(self.mlp_norm(attended, residual))
        return hidden


class Transformer(nn.Module):
    """Token ids and positions of one step in, hidden states out; ``compute_logits`` for the rows that need them."""

    rotary: Tensor | None

    def __init__(self, config: ModelConfig, max_model_len: int) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = _embedding(config.vocab_size, config.hidden_size)
        learned = config.positions == "learned"
        self.embed_positions = _embedding(config.max_position_embeddings, config.hidden_size) if learned else None
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = make_norm(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        table = None if learned else torch.empty(max_model_len, config.head_dim)  # filled like a weight, when loading
        self.register_buffer("rotary", table, persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv_cache: Sequence[LayerCache],
        metadata: AttentionMetadata,
    ) -> Tensor:
        """[T] int64 ids and positions → hidden states [T, C], normalised."""
        x = self.embed_tokens(input_ids).to(self._activation_dtype)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions).to(self._activation_dtype)
        residual = torch.zeros_like(x)
        for layer, cache in zip(self.layers, kv_cache, strict=True):
            x = layer(x, residual, positions, self.rotary, cache, metadata)
        hidden: Tensor = self.norm(x, residual)
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[S, C] → [S, vocabulary] fp32."""
        logits: Tensor = self.lm_head(hidden)
        return logits.float()

    @property
    def _activation_dtype(self) -> torch.dtype:
        """Norm weights are kept in the type that the activations flow in."""
        return next(self.norm.parameters()).dtype


def _embedding(count: int, size: int) -> nn.Embedding:
    """Without a random start: drawing one on the meta device makes torch import its compiler, two seconds."""
    return nn.Embedding(count, size, _weight=torch.empty(count, size))
