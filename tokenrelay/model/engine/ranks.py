"""A network over several processes: rank 0 schedules and samples, and tells the others each step before it runs it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tokenrelay.model.engine.executor import Executor, StepInputs
from tokenrelay.model.transformer.communicator import Communicator

NUM_PARTS = 9  # the arrays of StepInputs, and the block copies


class LeadingExecutor:
    """Rank 0's own executor, and word of what it does to the others. Raises RankLost when one of them is gone."""

    def __init__(self, own: Executor, communicator: Communicator) -> None:
        self._own = own
        self._communicator = communicator
        self._copies: Sequence[tuple[int, int]] = ()

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """The others copy theirs when they hear of the step."""
        self._copies = pairs
        self._own.copy_blocks(pairs)

    def forward(self, inputs: StepInputs, *, capturable: bool = True) -> Tensor:
        """As of any executor, at all ranks."""
        parts = _parts_of(inputs, self._copies)
        self._copies = ()
        self._communicator.broadcast(torch.tensor([part.numel() for part in parts]))
        self._communicator.broadcast(torch.cat(parts))
        return self._own.forward(inputs, capturable=capturable)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """The leader alone has the head."""
        return self._own.compute_logits(hidden)


@torch.inference_mode()
def follow(own: Executor, communicator: Communicator) -> None:
    """Run what the leader runs, until it is gone: then RankLost."""
    sizes = torch.zeros(NUM_PARTS, dtype=torch.int64)
    while True:
        communicator.broadcast(sizes)
        numbers = torch.empty(int(sizes.sum()), dtype=torch.int64)
        communicator.broadcast(numbers)
        inputs, copies = _step_of(torch.split(numbers, sizes.tolist()))
        if copies:
            own.copy_blocks(copies)
        own.forward(inputs)


def _parts_of(inputs: StepInputs, copies: Sequence[tuple[int, int]]) -> list[Tensor]:
    """All numbers of a step, as flat tensors of one type."""
    arrays = [np.empty(0) if array is None else array for array in (*inputs, np.array(copies))]
    return [torch.from_numpy(array.reshape(-1).astype(np.int64)) for array in arrays]


def _step_of(parts: tuple[Tensor, ...]) -> tuple[StepInputs, list[tuple[int, int]]]:
    """The inverse; the kernels want some of them as int32."""
    input_ids, positions, slots, tables, starts, lens, results, sinks, copies = (part.numpy() for part in parts)
    inputs = StepInputs(
        input_ids,
        positions,
        slots,
        tables.reshape(len(lens), -1).astype(np.int32),
        starts.astype(np.int32),
        lens.astype(np.int32),
        results.astype(np.int32),
        sinks if len(sinks) else None,
    )
    return inputs, [(source, to) for source, to in copies.reshape(-1, 2).tolist()]
