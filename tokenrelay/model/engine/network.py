"""The network as the engine sees it: the tensors of one step in, hidden states out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokenrelay.model.transformer.attention import AttentionMetadata
from tokenrelay.model.transformer.kv_cache import LayerCache, copy_blocks
from tokenrelay.model.transformer.transformer import Transformer


class StepInput(NamedTuple):
    """All that one step computes from, in main memory. ``block_copies`` come first: (from, to)."""

    input_ids: Tensor
    positions: Tensor
    metadata: AttentionMetadata
    block_copies: Sequence[tuple[int, int]] = ()


class Network:
    """A transformer and its KV cache, on one device."""

    def __init__(self, model: Transformer, kv_cache: Sequence[LayerCache], device: torch.device) -> None:
        self.model = model
        self._kv_cache = kv_cache
        self._device = device

    def run(self, step: StepInput) -> Tensor:
        """Hidden states [T, C]; the keys and values of the T tokens are in the cache then."""
        if step.block_copies:
            copy_blocks(self._kv_cache, step.block_copies)
        given, to = step.metadata, self._device
        metadata = AttentionMetadata(
            given.slot_mapping.to(to),
            given.block_tables.to(to),
            given.query_start_loc.to(to),
            given.seq_lens.to(to),
            None if given.sink_positions is None else given.sink_positions.to(to),
        )
        hidden: Tensor = self.model(step.input_ids.to(to), step.positions.to(to), self._kv_cache, metadata)
        return hidden
