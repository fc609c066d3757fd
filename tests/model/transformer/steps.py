"""Texts computed together, chunk by chunk, through a paged cache, as the engine does it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenrelay.model.transformer.attention import AttentionMetadata
from tokenrelay.model.transformer.kv_cache import allocate_kv_cache
from tokenrelay.model.transformer.transformer import Transformer

BLOCK = 16


def logits_of(model: Transformer, texts: Sequence[Tensor], chunk: int) -> list[Tensor]:
    """Each text's logits [T, vocabulary], its tokens computed in chunks beside those of the others."""
    width = -(-max(map(len, texts)) // BLOCK)
    tables = torch.randperm(width * len(texts)).view(len(texts), width)
    cache = allocate_kv_cache(model.config, tables.numel(), BLOCK, torch.float32, torch.device("cpu"))
    found: list[list[Tensor]] = [[] for _ in texts]
    for start in range(0, max(map(len, texts)), chunk):
        running = [index for index, text in enumerate(texts) if start < len(text)]
        places = [torch.arange(start, min(start + chunk, len(texts[index]))) for index in running]
        ids = torch.cat([texts[index][place] for index, place in zip(running, places, strict=True)])
        metadata = AttentionMetadata(
            torch.cat([_slots(tables[index], place) for index, place in zip(running, places, strict=True)]),
            tables[running].int(),
            torch.tensor([0, *map(len, places)]).cumsum(0).int(),
            torch.tensor([int(place[-1]) + 1 for place in places]).int(),
        )
        logits = model.compute_logits(model(ids, torch.cat(places), cache, metadata))
        for index, rows in zip(running, torch.split(logits, [len(place) for place in places]), strict=True):
            found[index].append(rows)
    return [torch.cat(rows) for rows in found]


def _slots(table: Tensor, positions: Tensor) -> Tensor:
    return table[positions // BLOCK] * BLOCK + positions % BLOCK
