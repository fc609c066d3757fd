"""The decoder. Its switches are in ``ModelConfig``; devices, quantization and fusion are in what it calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.transformer.attention import Attention, AttentionMetadata
from tokenrelay.model.transformer.kv_cache import LayerCache
from tokenrelay.model.transformer.layers import MLP, make_norm
from tokenrelay.model.transformer.rope import rotary_rows


class DecoderLayer(nn.Module):
    """Pre-norm block: x + attention(norm x), then x + mlp(norm x); the additions happen inside the norms."""

    def __init__(self, config: ModelConfig, window: int, num_sinks: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, window, num_sinks)
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
    """Token ids and positions of one step in, hidden states out; ``compute_logits`` for the rows that need them.

    With ``attention_sinks`` a text may outgrow ``max_model_len``, which is then how many keys a query sees: the first
    ``attention_sinks``, and the most recent ones as the rest. (``Attention`` says how)
    """

    rotary: Tensor | None
    activation_dtype = torch.float32  # of what flows between the layers, whatever the weights are

    def __init__(self, config: ModelConfig, max_model_len: int, attention_sinks: int = 0) -> None:
        """Raises ValueError: ``attention_sinks`` does not suit the network or ``max_model_len``."""
        super().__init__()
        if attention_sinks:
            _check_sinks(config, max_model_len, attention_sinks)
        self.config = config
        self.embed_tokens = _embedding(config.vocab_size, config.hidden_size)
        learned = config.positions == "learned"
        self.embed_positions = _embedding(config.max_position_embeddings, config.hidden_size) if learned else None
        streaming = max_model_len - attention_sinks if attention_sinks else 0
        self.layers = nn.ModuleList(
            DecoderLayer(config, streaming or config.window(layer), attention_sinks)
            for layer in range(config.num_layers)
        )
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
        """[T] int64 ids and positions → hidden states [T, C], normalised.

        Positions are below ``max_model_len`` unless the metadata have ``sink_positions``.
        """
        x = self.embed_tokens(input_ids).to(self.activation_dtype)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions).to(self.activation_dtype)
        rotary = self.rotary
        if metadata.sink_positions is not None and rotary is not None:
            rotary, positions, metadata = _rotary_of_step(self.config, rotary, positions, metadata)
        return self.run_layers(x, positions, rotary, kv_cache, metadata)

    def run_layers(
        self,
        x: Tensor,
        positions: Tensor,
        rotary: Tensor | None,
        kv_cache: Sequence[LayerCache],
        metadata: AttentionMetadata,
    ) -> Tensor:
        """x [T, C] → normalised hidden states [T, C]. On a CPU ``NativeLayers`` takes this method's place."""
        residual = torch.zeros_like(x)
        for layer, cache in zip(self.layers, kv_cache, strict=True):
            x = layer(x, residual, positions, rotary, cache, metadata)
        hidden: Tensor = self.norm(x, residual)
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[S, C] → [S, vocabulary] fp32."""
        logits: Tensor = self.lm_head(hidden)
        return logits.float()


def _check_sinks(config: ModelConfig, max_model_len: int, attention_sinks: int) -> None:
    if config.sliding_window:
        raise ValueError(
            f"attention_sinks ({attention_sinks}) and the model's own sliding_window ({config.sliding_window}) exclude "
            "each other; set attention_sinks to 0"
        )
    if config.positions != "rotary":
        raise ValueError(f"attention_sinks needs rotary positions, this model's are {config.positions}; set it to 0")
    if not 0 < attention_sinks < max_model_len:
        raise ValueError(f"attention_sinks ({attention_sinks}) must be between 0 and max_model_len ({max_model_len})")


def _rotary_of_step(
    config: ModelConfig, table: Tensor, positions: Tensor, metadata: AttentionMetadata
) -> tuple[Tensor, Tensor, AttentionMetadata]:
    """A small table of the step's own angles [2 T, D], as tokens and as the sinks see them, and indices into it."""
    assert metadata.sink_positions is not None
    rows = rotary_rows(config, torch.cat((positions, metadata.sink_positions)), table)
    own, as_seen = torch.arange(len(rows), device=rows.device).chunk(2)
    return rows, own, replace(metadata, sink_positions=as_seen)


def _embedding(count: int, size: int) -> nn.Embedding:
    """Without a random start: drawing one on the meta device makes torch import its compiler, two seconds."""
    return nn.Embedding(count, size, _weight=torch.empty(count, size))
