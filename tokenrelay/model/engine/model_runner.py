"""Turns a scheduler's decision into tensors, runs the network, and returns what was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain

import numpy as np
import torch
from torch import Tensor

from tokenrelay.model.engine.block_tables import Window
from tokenrelay.model.engine.executor import Executor, StepInputs
from tokenrelay.model.engine.logprobs import token_logprobs
from tokenrelay.model.engine.pooling import pool
from tokenrelay.model.engine.sampler import Sampler
from tokenrelay.model.engine.step import Sampled, ScheduledRequest, SchedulerOutput
from tokenrelay.model.sampling_params import TokenLogprobs
from tokenrelay.model.transformer.adapters import Adapters
from tokenrelay.model.transformer.transfer import tensor_on
from tokenrelay.model.transformer.transformer import Transformer

LOGITS_AT_ONCE = 64  # rows: a prompt's logits would be a large matrix


class ModelRunner:
    """Holds the network; knows nothing of queues or budgets, and of the device what ``executor`` says."""

    def __init__(
        self,
        model: Transformer,
        sampler: Sampler,
        executor: Executor,
        *,
        block_size: int,
        window: Window | None = None,
    ) -> None:
        self.model = model
        self.adapters = Adapters(model)
        self._sampler = sampler
        self.executor = executor
        self._block_size = block_size
        self._window = window or Window()

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> list[Sampled]:
        """One forward pass over all scheduled tokens and drafts."""
        if output.block_copies:
            self.executor.copy_blocks(output.block_copies)
        batch = output.scheduled
        self.adapters.use([(entry.request.adapter, entry.num_rows) for entry in batch])
        starts = list(accumulate((entry.num_rows for entry in batch), initial=0))
        hidden = self.executor.forward(self._inputs(batch, starts), capturable=not self.adapters.in_use)
        sampled = self._with_prompt_logprobs(self._sample(batch, hidden, starts), batch, hidden, starts)
        for index, entry in enumerate(batch):
            if entry.request.pooling is not None:
                sampled[index] = pool(entry, hidden[starts[index] : starts[index + 1]])
        return sampled

    def _inputs(self, batch: Sequence[ScheduledRequest], starts: Sequence[int]) -> StepInputs:
        """Lists first: most steps have a row or two per request, and arrays of those cost more than they bring."""
        size = self._block_size
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for entry in batch:
            request, span = entry.request, _positions(entry)
            ids += request.token_ids[span.start : span.start + entry.num_tokens]
            ids += entry.draft_token_ids
            positions += span
            slots += [request.block_table[at // size] * size + at % size for at in span]
        tables = [entry.request.block_table for entry in batch]
        padded = np.zeros((len(batch), max(map(len, tables))), dtype=np.int32)
        for row, table in zip(padded, tables, strict=True):
            row[: len(table)] = table
        np.maximum(padded, 0, out=padded)  # what fell out of the window is not read
        return StepInputs(
            np.array(ids, dtype=np.int64),
            np.array(positions, dtype=np.int64),
            np.array(slots, dtype=np.int64),
            padded,
            np.array(starts, dtype=np.int32),
            np.array([entry.request.num_computed_tokens + entry.num_rows for entry in batch], dtype=np.int32),
            np.array([entry.num_results for entry in batch], dtype=np.int32),
            self._sink_positions(positions),
        )

    def _sink_positions(self, positions: Sequence[int]) -> np.ndarray | None:
        """Where queries stand as the sinks see them, once some have outgrown the context. (StreamingLLM)"""
        last = self._window.num_sinks + self._window.size - 1
        if not self._window.num_sinks or max(positions) <= last:
            return None
        return np.array(positions, dtype=np.int64).clip(max=last)

    def _sample(self, batch: Sequence[ScheduledRequest], hidden: Tensor, starts: Sequence[int]) -> list[Sampled]:
        sampled = [Sampled()] * len(batch)
        sampling = [index for index, entry in enumerate(batch) if entry.samples]
        if sampling:
            spans = [range(starts[i + 1] - batch[i].num_sampled_rows, starts[i + 1]) for i in sampling]
            logits = self.executor.compute_logits(_chosen(hidden, [*chain(*spans)]))
            for index, one in zip(sampling, self._sampler.sample(logits, [batch[i] for i in sampling]), strict=True):
                sampled[index] = one
        return sampled

    def _with_prompt_logprobs(
        self, sampled: list[Sampled], batch: Sequence[ScheduledRequest], hidden: Tensor, starts: Sequence[int]
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
            logits = self.executor.compute_logits(hidden[start : start + len(some)])
            found += token_logprobs(logits, some, request.params.prompt_logprobs or 0)
        return tuple(found)


def _chosen(hidden: Tensor, rows: list[int]) -> Tensor:
    """Ascending rows. Where all decode that is every one, and nothing is copied."""
    return hidden if len(rows) == hidden.shape[0] else hidden[tensor_on(hidden.device, rows, torch.int64)]


def _positions(entry: ScheduledRequest) -> range:
    start = entry.request.num_computed_tokens
    return range(start, start + entry.num_rows)
