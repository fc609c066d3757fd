"""Low-rank adapters beside a network's matrices: y = W x + scale · B(A x), for each row those of its own adapter.

(LoRA, Hu et al. 2021) The network's own weights stay as they are, quantized or not, so that rows of several adapters
and rows of none share a forward pass. A step without adapters runs as if there were none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenrelay.model.transformer.kernels.packed_linear import PackedLinear
from tokenrelay.model.transformer.transfer import to_device
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


class _Step:
    """Which rows of the next forward pass are whose. One object, read by every ``LoRALinear``."""

    def __init__(self) -> None:
        self.groups: Sequence[tuple[Adapter, Rows]] = ()


class LoRALinear(nn.Module):
    """A linear layer, of whatever kind, and the updates of a step's adapters."""

    def __init__(self, linear: nn.Module, name: str, step: _Step) -> None:
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


class Adapters:
    """The adapters in memory, by id. ``use`` tells, before every forward pass, which rows are whose."""

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._loaded: dict[str, Adapter] = {}
        self._step = _Step()
        self._attached = False

    def __contains__(self, adapter_id: str) -> bool:
        return adapter_id in self._loaded

    def add(self, adapter_id: str, adapter: Adapter) -> None:
        """The first one costs every matrix a wrapper; until then the network is as it was loaded."""
        if not self._attached:
            _attach(self._model, self._step)
            self._attached = True
        self._loaded[adapter_id] = adapter

    def remove(self, adapter_id: str) -> None:
        del self._loaded[adapter_id]

    @property
    def in_use(self) -> bool:
        """Whether the next forward pass has rows of one."""
        return bool(self._step.groups)

    def use(self, spans: Sequence[tuple[str, int]]) -> None:
        """``spans``: the adapter's id ("": none) and the number of rows of each request, in the order of the rows."""
        starts = accumulate((count for _, count in spans), initial=0)
        own: dict[str, list[range]] = {}
        for start, (adapter_id, count) in zip(starts, spans, strict=False):
            if adapter_id:
                own.setdefault(adapter_id, []).append(range(start, start + count))
        device = _device(self._model)
        self._step.groups = [(self._loaded[name], _rows(ranges, device)) for name, ranges in own.items()]


def _rows(ranges: Sequence[range], device: torch.device) -> Rows:
    """A slice needs no copies."""
    first, last = ranges[0], ranges[-1]
    if last.stop - first.start == sum(map(len, ranges)):
        return slice(first.start, last.stop)
    return to_device(torch.tensor([*chain(*ranges)]), device)


def _attach(model: Transformer, step: _Step) -> None:
    """Wrap the matrices, and go layer by layer through the steps that need it, whatever runs the others at once."""
    for number, layer in enumerate(model.layers):
        for name in ADAPTED:
            parent, _, child = name.partition(".")
            block = getattr(layer, parent)
            if (linear := getattr(block, child, None)) is not None:  # an MLP of experts has none
                setattr(block, child, LoRALinear(linear, f"layers.{number}.{name}", step))
    run_layers = model.run_layers

    def run_either(*arguments: Any) -> Tensor:
        return Transformer.run_layers(model, *arguments) if step.groups else run_layers(*arguments)

    model.run_layers = run_either  # type: ignore[method-assign, assignment]


def update(parts: Sequence[Part], model: Transformer) -> Update:
    """Made ready for the device of ``model``."""
    first = min(part.first for part in parts)
    a = torch.cat([part.a for part in parts])
    b = torch.zeros(max(part.first + len(part.b) for part in parts) - first, len(a))
    for part, rank in zip(parts, accumulate((len(part.a) for part in parts), initial=0), strict=False):
        row = part.first - first
        b[row : row + len(part.b), rank : rank + len(part.a)] = part.b.float() * part.scale
    return Update(first, _linear(a, model), _linear(_narrowed(b, a.dtype), model))


def _narrowed(b: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the type it came in, if the scale has rounded nothing: most are powers of two."""
    narrow = b.to(dtype)
    return narrow if torch.equal(narrow.float(), b) else b


def _linear(weight: Tensor, model: Transformer) -> nn.Module:
    """In the type it came in where the native kernels multiply it: an adapter is small."""
    device = _device(model)
    if device.type == "cpu":
        return PackedLinear(weight)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(device, model.activation_dtype), requires_grad=False)
    return linear


def _device(model: Transformer) -> torch.device:
    """Where its layers are: their norms are parameters, whatever became of the matrices."""
    return next(model.layers.parameters()).device
