"""Our network from a saved checkpoint, and its logits in chunks and single tokens over a paged cache."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.transformer.attention import AttentionMetadata
from tokenrelay.model.transformer.kv_cache import allocate_kv_cache
from tokenrelay.model.transformer.loading import load_transformer
from tokenrelay.model.transformer.transformer import Transformer
from tokenrelay.model.weights.safetensors import SafetensorsCheckpoint

CPU = torch.device("cpu")
_BLOCK = 16
_BLOCKS = [5, 0, 7, 2, 6, 1]


def load(folder: Path, max_model_len: int = 128) -> tuple[ModelConfig, Transformer]:
    """In fp32 on the CPU."""
    checkpoint = SafetensorsCheckpoint(folder)
    config, tensors = checkpoint.config(), checkpoint.tensors(torch.float32)
    model = load_transformer(
        config, tensors, checkpoint.rules, max_model_len=max_model_len, dtype=torch.float32, device=CPU
    )
    return config, model


def logits(config: ModelConfig, model: Transformer, ids: Tensor, prefilled: int = 0) -> Tensor:
    """[T] ids → [T, vocabulary]: two chunks up to ``prefilled``, then token by token; 0: all at once."""
    cache = allocate_kv_cache(config, 8, _BLOCK, torch.float32, CPU)
    first = prefilled * 3 // 5
    ends = [0, first, *range(prefilled, len(ids) + 1)] if prefilled else [0, len(ids)]
    rows = []
    for start, end in pairwise(ends):
        positions = torch.arange(start, end)
        hidden = model(ids[start:end], positions, cache, _metadata(start, end))
        rows.append(model.compute_logits(hidden))
    return torch.cat(rows)


def _metadata(start: int, end: int) -> AttentionMetadata:
    positions, table = torch.arange(start, end), torch.tensor(_BLOCKS)
    return AttentionMetadata(
        table[positions // _BLOCK] * _BLOCK + positions % _BLOCK,
        table.int().unsqueeze(0),
        torch.tensor([0, end - start], dtype=torch.int32),
        torch.tensor([end], dtype=torch.int32),
    )
