"""Where a step is computed. The runner knows arrays on the host and hidden states; an executor knows the device.

What moves in a step on a GPU: all inputs in one copy from pinned memory, then what the rows' sampling parameters need
(nothing for greedy ones), and back come the drawn ids with their probabilities. The host waits there, once. It waits
once more each for log-probabilities, an embedding, a dynamic temperature and a grammar.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from tokenrelay.model.transformer.attention import AttentionMetadata
from tokenrelay.model.transformer.kv_cache import LayerCache, copy_blocks
from tokenrelay.model.transformer.transfer import to_device
from tokenrelay.model.transformer.transformer import Transformer

ALIGNMENT = 16  # bytes


class StepInputs(NamedTuple):
    """What a step computes: T tokens of B requests, one request after the other. Arrays on the host."""

    input_ids: np.ndarray  # [T] int64
    positions: np.ndarray  # [T] int64
    slot_mapping: np.ndarray  # [T] int64
    block_tables: np.ndarray  # [B, M] int32
    query_start_loc: np.ndarray  # [B + 1] int32
    seq_lens: np.ndarray  # [B] int32
    num_results: np.ndarray  # [B] int32
    sink_positions: np.ndarray | None = None  # [T] int64

    @property
    def is_decode(self) -> bool:
        """Whether every request has one token."""
        return len(self.input_ids) == len(self.seq_lens) and self.sink_positions is None

    def packed(self) -> Tensor:
        """All arrays in one, so that one copy takes them to a device."""
        *starts, end = _starts(self)
        buffer = np.zeros(end, dtype=np.uint8)
        for start, array in zip(starts, _arrays(self), strict=True):
            buffer[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        return torch.from_numpy(buffer)

    def on_host(self) -> StepTensors:
        """The arrays themselves, as tensors."""
        tensors = [torch.from_numpy(array) for array in _arrays(self)]
        return StepTensors(tensors[0], tensors[1], AttentionMetadata(*tensors[2:]))

    def unpacked(self, buffer: Tensor) -> StepTensors:
        """Views of such a buffer, wherever it is."""
        views = [
            buffer[start : start + array.nbytes].view(getattr(torch, array.dtype.name)).view(array.shape)
            for start, array in zip(_starts(self), _arrays(self), strict=False)
        ]
        return StepTensors(views[0], views[1], AttentionMetadata(*views[2:]))


class StepTensors(NamedTuple):
    """The same as the network takes it."""

    input_ids: Tensor
    positions: Tensor
    metadata: AttentionMetadata


class Executor(Protocol):
    """Runs the network over a step's tokens."""

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Of the KV cache, (from, to) each; comes before the step's ``forward``."""

    def forward(self, inputs: StepInputs, *, capturable: bool = True) -> Tensor:
        """Hidden states [T, C], until the next call; only ``num_results`` of each request's last rows need be right.

        ``capturable``: the network does what it always does.
        """

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[S, C] → [S, vocabulary] fp32, where the sampler can work on them."""


class EagerExecutor:
    """One operation after the other."""

    def __init__(self, model: Transformer, kv_cache: Sequence[LayerCache], device: torch.device) -> None:
        self.device = device
        self._model = model
        self._kv_cache = kv_cache

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """In every layer."""
        copy_blocks(self._kv_cache, pairs)

    def forward(self, inputs: StepInputs, *, capturable: bool = True) -> Tensor:
        """Whatever the step is. A CPU needs no copy, and so no packing."""
        if self.device.type == "cpu":
            return self.run(inputs.on_host())
        return self.run(inputs.unpacked(to_device(inputs.packed(), self.device)))

    def run(self, tensors: StepTensors) -> Tensor:
        """The network over tensors that are on the device."""
        hidden: Tensor = self._model(tensors.input_ids, tensors.positions, self._kv_cache, tensors.metadata)
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Of mps on the host: the sampler's sums are in double precision, which such devices do not have."""
        logits = self._model.compute_logits(hidden)
        return logits.cpu() if self.device.type == "mps" else logits


def _arrays(inputs: StepInputs) -> list[np.ndarray]:
    return [array for array in inputs if array is not None]


def _starts(inputs: StepInputs) -> list[int]:
    """Where each array begins in the buffer, and where the last one ends."""
    sizes = (-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in _arrays(inputs))
    return list(accumulate(sizes, initial=0))
