"""How checkpoints store some tensors in another way than our network holds them; ``Rule.layout`` names one of these."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tokenrelay.model.config import ModelConfig

Layout = Callable[[Tensor, ModelConfig], Tensor]


def transposed(stored: Tensor, config: ModelConfig) -> Tensor:
    """[in, out], as GPT-2's Conv1D has it -> [out, in]."""
    return stored.T


LAYOUTS: dict[str, Layout] = {"transposed": transposed}
ROW_ORDERS: frozenset[str] = frozenset()  # of these, the ones that a quantized matrix can follow: they move whole rows
