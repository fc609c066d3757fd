"""Low-rank adapters beside a network's matrices: y = W x + scale · B(A x), for each row those of its own adapter.

(LoRA, Hu et al. 2021) The network's own weights stay as they are, quantized or not, so that rows of several adapters
and rows of none share a forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokenrelay.model.transformer.kernels.packed_linear import PackedLinear
from tokenrelay.model.transformer.transformer import Transformer

ADAPTED = ("attention.qkv_proj", "attention.o_proj", "mlp.up_proj", "mlp.down_proj")  # of a layer


class Part(NamedTuple):
    """What an adapter adds to some columns of one matrix's output, from ``first`` on, as it was trained."""

    first: int
    a: Tensor  # [rank, K]
    b: Tensor  # [N, rank]
    scale: float


Rows = slice | Tensor  # of a step; numbers where they are not one behind the other


class Update(NamedTuple):
    """All parts of one matrix at once: their A one below the other, their B on the diagonal, scales multiplied in."""

    first: int
    a: nn.Module  # [T, K] → [T, ranks]
    b: nn.Module  # [T, ranks] → [T, N]

    def add_to(self, out: Tensor, x: Tensor, rows: Rows) -> None:
        added = self.b(self.a(x[rows]))
        columns = out.narrow(1, self.first, added.shape[1])
        if isinstance(rows, slice):
            columns[rows].add_(added)
        else:
            columns.index_add_(0, rows, added)


Adapter = Mapping[str, Update]  # by the name of the module whose output it changes


class Step:
    """Which rows of the next forward pass are whose. One object, read by every ``LoRALinear``."""

    def __init__(self) -> None:
        self.groups: Sequence[tuple[Adapter, Rows]] = ()


class LoRALinear(nn.Module):
    """A linear layer, of whatever kind, and the updates of a step's adapters."""

    def __init__(self, linear: nn.Module, name: str, step: Step) -> None:
        super().__init__()
        self.linear = linear
        self._name = name
        self._step = step

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] → [T, N]. Each adapter sees its own rows alone, whose bits do not depend on their number."""
        out: Tensor = self.linear(x)
        for adapter, rows in self._step.groups:
            if update := adapter.get(self._name):
                update.add_to(out, x, rows)
        return out


def update(parts: Sequence[Part], model: Transformer) -> Update:
    """Made ready for the device of ``model``."""
    first = min(part.first for part in parts)
    a = torch.cat([part.a for part in parts])
    b = torch.zeros(max(part.first + len(part.b) for part in parts) - first, len(a))
    for part, rank in zip(parts, accumulate((len(part.a) for part in parts), initial=0), strict=False):
        row = part.first - first
        b[row : row + len(part.b), rank : rank + len(part.a)] = part.b.float() * part.scale
    return Update(first, _linear(a, a.dtype, model), _linear(b, a.dtype, model))


def _linear(weight: Tensor, stored: torch.dtype, model: Transformer) -> nn.Module:
    """On a CPU of the type that the adapter is stored in, if the scale has rounded nothing: most are powers of two."""
    device = device_of(model)
    if device.type == "cpu":
        narrow = weight.to(stored)
        return PackedLinear(narrow if torch.equal(narrow.to(weight.dtype), weight) else weight)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(device, model.activation_dtype), requires_grad=False)
    return linear


def device_of(model: Transformer) -> torch.device:
    """Where its layers are: their norms are parameters, whatever became of the matrices."""
    return next(model.layers.parameters()).device
