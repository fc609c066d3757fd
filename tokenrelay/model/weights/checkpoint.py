"""One door to a checkpoint's tensors, whatever its format. Needs torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families import Rule
from tokenrelay.model.quantized import Quantized
from tokenrelay.model.weights.gguf.checkpoint import GGUFCheckpoint
from tokenrelay.model.weights.safetensors import SafetensorsCheckpoint
from tokenrelay.model.weights.sources import ModelSource


class Checkpoint(Protocol):
    """A described network and its tensors, under the names and in the layout that its rules know."""

    rules: tuple[Rule, ...]

    def config(self) -> ModelConfig:
        """The network's shape; raises UnsupportedModelError or CheckpointError."""

    def tensors(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor once, converted one at a time; raises CheckpointError at the first that cannot be read."""

    def stored(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, torch.Tensor | Quantized]]:
        """The same, but what is stored in few bits, in a way that our kernels know, comes as it is stored."""


def open_checkpoint(source: ModelSource) -> Checkpoint:
    """The checkpoint behind ``source``; files are opened when tensors are read."""
    return GGUFCheckpoint(source.path) if source.kind == "gguf" else SafetensorsCheckpoint(source.path)
