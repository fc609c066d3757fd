"""The decoder of "Attention Is All You Need" in plain torch, for transformers' own machinery to save and run."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class VanillaTransformerConfig(PreTrainedConfig):  # type: ignore[misc]
    """The keys of ``tokenrelay.model.families.vanilla_transformer``."""

    model_type = "vanilla-transformer"

    vocab_size: int = 128
    hidden_size: int = 64
    intermediate_size: int = 96
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    max_position_embeddings: int = 128
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True


class _Layer(nn.Module):
    def __init__(self, config: VanillaTransformerConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(width, width, bias=False)
        self.attention_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.up_proj, self.down_proj = nn.Linear(width, inner), nn.Linear(inner, width)
        self.mlp_norm = nn.LayerNorm(width, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention_norm(x + self.o_proj(self._attend(x)))
        normed: Tensor = self.mlp_norm(x + self.down_proj(self.up_proj(x).relu()))
        return normed

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = (self._heads(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)


class VanillaTransformer(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Every step reads the whole text again."""

    config_class = VanillaTransformerConfig
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012 (transformers' own shape)

    def __init__(self, config: VanillaTransformerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        width = self.config.hidden_size
        x = self.embed_tokens(input_ids) * math.sqrt(width) + _sinusoids(input_ids.shape[1], width)
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.lm_head(x))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def prepare_inputs_for_generation(self, input_ids: Tensor, **_: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}


def _sinusoids(length: int, width: int) -> Tensor:
    table = torch.empty(length, width)
    for position in range(length):
        for pair in range(0, width, 2):
            angle = position / 10_000 ** (pair / width)
            table[position, pair], table[position, pair + 1] = math.sin(angle), math.cos(angle)
    return table
