"""Turns a scheduler's decision into tensors, runs the network, and returns the sampled ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tokenrelay.model.engine.sampler import Sampler
from tokenrelay.model.engine.scheduler import ScheduledRequest, SchedulerOutput
from tokenrelay.model.transformer.attention import AttentionMetadata
from tokenrelay.model.transformer.kv_cache import LayerCache
from tokenrelay.model.transformer.transformer import Transformer


class ModelRunner:
    """Holds the network and its cache; knows nothing of queues or budgets."""

    def __init__(
        self,
        model: Transformer,
        kv_cache: Sequence[LayerCache],
        sampler: Sampler,
        *,
        block_size: int,
        device: torch.device,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._sampler = sampler
        self._block_size = block_size
        self._device = device

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> list[int | None]:
        """One forward pass over all scheduled tokens; per request the next token, or None after a mere chunk."""
        batch = output.scheduled
        input_ids = self._tensor(np.concatenate([_token_ids(entry) for entry in batch]))
        positions = [_positions(entry) for entry in batch]
        metadata = self._metadata(batch, positions)
        hidden = self._model(input_ids, self._tensor(np.concatenate(positions)), self._kv_cache, metadata)
        return self._sample(batch, hidden, metadata.query_start_loc)

    def _metadata(self, batch: Sequence[ScheduledRequest], positions: Sequence[np.ndarray]) -> AttentionMetadata:
        tables = [np.array(entry.request.block_table, dtype=np.int64) for entry in batch]
        slots = [
            table[position // self._block_size] * self._block_size + position % self._block_size
            for table, position in zip(tables, positions, strict=True)
        ]
        padded = np.zeros((len(batch), max(len(table) for table in tables)), dtype=np.int32)
        for row, table in zip(padded, tables, strict=True):
            row[: len(table)] = table
        starts = np.cumsum([0, *(entry.num_tokens for entry in batch)], dtype=np.int32)
        lens = np.array([entry.request.num_computed_tokens + entry.num_tokens for entry in batch], dtype=np.int32)
        return AttentionMetadata(
            self._tensor(np.concatenate(slots)), self._tensor(padded), self._tensor(starts), self._tensor(lens)
        )

    def _sample(self, batch: Sequence[ScheduledRequest], hidden: Tensor, starts: Tensor) -> list[int | None]:
        sampled: list[int | None] = [None] * len(batch)
        rows = [index for index, entry in enumerate(batch) if entry.samples]
        if rows:
            last = starts[1:][rows].long() - 1
            logits = self._model.compute_logits(hidden[last])
            ids = self._sampler.sample(logits, [batch[index].request for index in rows])
            for index, token_id in zip(rows, ids, strict=True):
                sampled[index] = token_id
        return sampled

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _token_ids(entry: ScheduledRequest) -> np.ndarray:
    start = entry.request.num_computed_tokens
    return np.array(entry.request.token_ids[start : start + entry.num_tokens], dtype=np.int64)


def _positions(entry: ScheduledRequest) -> np.ndarray:
    start = entry.request.num_computed_tokens
    return np.arange(start, start + entry.num_tokens, dtype=np.int64)
