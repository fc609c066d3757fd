"""Turns a scheduler's decision into tensors, runs the network, and returns what was drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tokenrelay.model.engine.block_tables import Window
from tokenrelay.model.engine.logprobs import token_logprobs
from tokenrelay.model.engine.network import Network, StepInput
from tokenrelay.model.engine.pooling import pool
from tokenrelay.model.engine.sampler import Sampler
from tokenrelay.model.engine.step import Sampled, ScheduledRequest, SchedulerOutput
from tokenrelay.model.sampling_params import TokenLogprobs
from tokenrelay.model.transformer.attention import AttentionMetadata
from tokenrelay.model.transformer.transformer import Transformer

LOGITS_AT_ONCE = 64  # rows: a prompt's logits would be a large matrix


class ModelRunner:
    """Holds the network; knows nothing of queues or budgets."""

    def __init__(
        self,
        network: Network,
        sampler: Sampler,
        *,
        block_size: int,
        device: torch.device,
        window: Window | None = None,
    ) -> None:
        self.network = network
        self._sampler = sampler
        self._block_size = block_size
        self._device = device
        self._window = window or Window()

    @property
    def model(self) -> Transformer:
        return self.network.model

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> list[Sampled]:
        """One forward pass over all scheduled tokens and drafts."""
        batch = output.scheduled
        hidden = self.network.run(self._step_input(output))
        starts = np.cumsum([0, *(entry.num_rows for entry in batch)])
        sampled = self._with_prompt_logprobs(self._sample(batch, hidden, starts), batch, hidden, starts)
        for index, entry in enumerate(batch):
            if entry.request.pooling is not None:
                sampled[index] = pool(entry, hidden[starts[index] : starts[index + 1]])
        return sampled

    def _step_input(self, output: SchedulerOutput) -> StepInput:
        batch = output.scheduled
        positions = [_positions(entry) for entry in batch]
        return StepInput(
            torch.from_numpy(np.concatenate([_token_ids(entry) for entry in batch])),
            torch.from_numpy(np.concatenate(positions)),
            self._metadata(batch, positions),
            output.block_copies,
        )

    def _metadata(self, batch: Sequence[ScheduledRequest], positions: Sequence[np.ndarray]) -> AttentionMetadata:
        tables = [np.array(entry.request.block_table, dtype=np.int64) for entry in batch]
        slots = [
            table[position // self._block_size] * self._block_size + position % self._block_size
            for table, position in zip(tables, positions, strict=True)
        ]
        padded = np.zeros((len(batch), max(len(table) for table in tables)), dtype=np.int32)
        for row, table in zip(padded, tables, strict=True):
            row[: len(table)] = table.clip(min=0)  # what fell out of the window is not read
        starts = np.cumsum([0, *(entry.num_rows for entry in batch)], dtype=np.int32)
        lens = np.array([entry.request.num_computed_tokens + entry.num_rows for entry in batch], dtype=np.int32)
        return AttentionMetadata(
            torch.from_numpy(np.concatenate(slots)),
            torch.from_numpy(padded),
            torch.from_numpy(starts),
            torch.from_numpy(lens),
            self._sink_positions(np.concatenate(positions)),
        )

    def _sink_positions(self, positions: np.ndarray) -> Tensor | None:
        """Where queries stand as the sinks see them, once some have outgrown the context. (StreamingLLM)"""
        last = self._window.num_sinks + self._window.size - 1
        if not self._window.num_sinks or positions.max() <= last:
            return None
        return torch.from_numpy(positions.clip(max=last))

    def _sample(self, batch: Sequence[ScheduledRequest], hidden: Tensor, starts: np.ndarray) -> list[Sampled]:
        sampled = [Sampled()] * len(batch)
        sampling = [index for index, entry in enumerate(batch) if entry.samples]
        if sampling:
            rows = [np.arange(starts[i + 1] - len(batch[i].draft_token_ids) - 1, starts[i + 1]) for i in sampling]
            logits = self.model.compute_logits(hidden[self._tensor(np.concatenate(rows))])
            for index, one in zip(sampling, self._sampler.sample(logits, [batch[i] for i in sampling]), strict=True):
                sampled[index] = one
        return sampled

    def _with_prompt_logprobs(
        self, sampled: list[Sampled], batch: Sequence[ScheduledRequest], hidden: Tensor, starts: np.ndarray
    ) -> list[Sampled]:
        for index, entry in enumerate(batch):
            if entry.request.wants_prompt_logprobs:
                rows = hidden[starts[index] : starts[index + 1]]
                sampled[index] = sampled[index]._replace(prompt_logprobs=self._prompt_logprobs(entry, rows))
        return sampled

    def _prompt_logprobs(self, entry: ScheduledRequest, hidden: Tensor) -> tuple[TokenLogprobs, ...]:
        """Of the prompt tokens that follow this chunk's: row i predicts the token behind it."""
        request = entry.request
        first = request.num_computed_tokens + 1
        targets = request.token_ids[first : min(first + entry.num_tokens, request.num_prompt_tokens)]
        found: list[TokenLogprobs] = []
        for start in range(0, len(targets), LOGITS_AT_ONCE):
            some = targets[start : start + LOGITS_AT_ONCE]
            logits = self.model.compute_logits(hidden[start : start + len(some)])
            found += token_logprobs(logits, some, request.params.prompt_logprobs or 0)
        return tuple(found)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _token_ids(entry: ScheduledRequest) -> np.ndarray:
    start = entry.request.num_computed_tokens
    return np.array(
        [*entry.request.token_ids[start : start + entry.num_tokens], *entry.draft_token_ids], dtype=np.int64
    )


def _positions(entry: ScheduledRequest) -> np.ndarray:
    start = entry.request.num_computed_tokens
    return np.arange(start, start + entry.num_rows, dtype=np.int64)
