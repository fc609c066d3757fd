"""Decode steps as CUDA graphs: the host launches one graph instead of a thousand kernels.

A graph has fixed shapes and addresses. So there is one per batch size of a few, a step is padded to the next of them,
and its inputs are copied to where the graph reads them. Everything else (prompts, drafts) runs eagerly.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from tokenrelay.model.engine.executor import EagerExecutor, StepInputs
from tokenrelay.model.transformer.transfer import pinned

Replay = Callable[[], Tensor]
Capture = Callable[[Replay], Replay]


def batch_sizes(largest: int) -> list[int]:
    """1, 2, 4, 8, … and the largest. A decode step reads all weights whatever its size, so padding costs little."""
    return [*(1 << power for power in range((largest - 1).bit_length())), largest]


def padded(inputs: StepInputs, size: int, width: int) -> StepInputs:
    """A decode step of ``size`` requests with tables of ``width`` blocks. The added ones have one token, which is
    written nowhere and sees what the cache's first slot holds."""
    more = size - len(inputs.seq_lens)
    tables = np.zeros((size, width), dtype=np.int32)
    tables[: len(inputs.seq_lens), : inputs.block_tables.shape[1]] = inputs.block_tables
    return StepInputs(
        np.pad(inputs.input_ids, (0, more)),
        np.pad(inputs.positions, (0, more)),
        np.pad(inputs.slot_mapping, (0, more), constant_values=-1),
        tables,
        np.arange(size + 1, dtype=np.int32),
        np.pad(inputs.seq_lens, (0, more), constant_values=1),
        np.ones(size, dtype=np.int32),
    )


def empty_step(size: int, width: int) -> StepInputs:
    """Nothing but padding."""
    ids, ints = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32)
    return padded(StepInputs(ids, ids, ids, ints.reshape(0, 0), ints, ints, ints), size, width)


class _Graph(NamedTuple):
    buffer: Tensor  # where the inputs are read
    replay: Replay


class GraphExecutor:
    """Replays decode steps, and leaves the others to ``eager``."""

    def __init__(
        self, eager: EagerExecutor, capture: Capture, *, max_num_seqs: int, max_blocks: int, progress: bool = False
    ) -> None:
        """Captures a graph per batch size, the largest first: the others fit into its memory."""
        self._eager = eager
        self._width = max_blocks
        self._sizes = batch_sizes(max_num_seqs)
        bar = track(self._sizes[::-1], "capturing CUDA graphs", console=Console(stderr=True), disable=not progress)
        self._graphs = {size: self._capture(size, capture) for size in bar}

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """As the eager executor."""
        self._eager.copy_blocks(pairs)

    def forward(self, inputs: StepInputs, *, capturable: bool = True) -> Tensor:
        """A replay if the step is a decode step of a size that was captured."""
        num_seqs = len(inputs.seq_lens)
        if not (capturable and inputs.is_decode and num_seqs <= self._sizes[-1]):
            return self._eager.forward(inputs)
        size = self._sizes[bisect_left(self._sizes, num_seqs)]
        graph = self._graphs[size]
        graph.buffer.copy_(pinned(padded(inputs, size, self._width).packed(), self._eager.device), non_blocking=True)
        return graph.replay()[:num_seqs]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """As the eager executor."""
        return self._eager.compute_logits(hidden)

    def _capture(self, size: int, capture: Capture) -> _Graph:
        inputs = empty_step(size, self._width)
        buffer = inputs.packed().to(self._eager.device, copy=True)
        tensors = inputs.unpacked(buffer)
        with torch.inference_mode():
            return _Graph(buffer, capture(lambda: self._eager.run(tensors)))


class CudaCapture:
    """Records what a function launches. All its graphs share one pool of memory: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Replay) -> Replay:
        """A function that launches all of it again, and returns the same tensor with new content."""
        with torch.cuda.device(self._device):
            self._warm_up(run)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    def _warm_up(self, run: Replay) -> None:
        """Libraries allocate their workspaces on first use, which a capture forbids."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
