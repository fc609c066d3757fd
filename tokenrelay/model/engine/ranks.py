"""A network over several processes: rank 0 schedules and samples, and tells the others each step before it runs it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenrelay.model.engine.network import Network, StepInput
from tokenrelay.model.transformer.attention import AttentionMetadata
from tokenrelay.model.transformer.communicator import Communicator
from tokenrelay.model.transformer.kv_cache import LayerCache
from tokenrelay.model.transformer.transformer import Transformer

NUM_PARTS = 8  # tensors that make up a step


class LeadingNetwork(Network):
    """Rank 0's share. Raises RankLost when another rank is gone."""

    def __init__(
        self, model: Transformer, kv_cache: Sequence[LayerCache], device: torch.device, communicator: Communicator
    ) -> None:
        super().__init__(model, kv_cache, device)
        self._communicator = communicator

    def run(self, step: StepInput) -> Tensor:
        """As of any network, at all ranks."""
        parts = _parts_of(step)
        self._communicator.broadcast(torch.tensor([part.numel() for part in parts]))
        self._communicator.broadcast(torch.cat(parts))
        return super().run(step)


@torch.inference_mode()
def follow(own: Network, communicator: Communicator) -> None:
    """Run what the leader runs, until it is gone: then RankLost."""
    sizes = torch.zeros(NUM_PARTS, dtype=torch.int64)
    while True:
        communicator.broadcast(sizes)
        numbers = torch.empty(int(sizes.sum()), dtype=torch.int64)
        communicator.broadcast(numbers)
        own.run(_step_of(torch.split(numbers, sizes.tolist())))


def _parts_of(step: StepInput) -> list[Tensor]:
    """All numbers of a step, as flat tensors of one type."""
    metadata = step.metadata
    sinks, copies = metadata.sink_positions, torch.tensor(step.block_copies)
    parts = [
        step.input_ids,
        step.positions,
        metadata.slot_mapping,
        metadata.block_tables,
        metadata.query_start_loc,
        metadata.seq_lens,
        torch.empty(0) if sinks is None else sinks,
        copies,
    ]
    return [part.flatten().long() for part in parts]


def _step_of(parts: tuple[Tensor, ...]) -> StepInput:
    """The inverse; the kernels want some of them as int32."""
    input_ids, positions, slots, tables, starts, lens, sinks, copies = parts
    tables = tables.view(len(lens), -1)
    metadata = AttentionMetadata(slots, tables.int(), starts.int(), lens.int(), sinks if len(sinks) else None)
    pairs = [(source, to) for source, to in copies.view(-1, 2).tolist()]
    return StepInput(input_ids, positions, metadata, pairs)
