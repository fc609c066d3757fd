"""Low-rank adapters beside a network's matrices: y = W x + scale · B(A x), for each row those of its own adapter.

(LoRA, Hu et al. 2021) The network's own weights stay as they are, quantized or not, so that rows of several adapters
and rows of none share a forward pass. A step without adapters runs as if there were none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenrelay.model.transformer.kernels.packed_linear import PackedLinear
from tokenrelay.model.transformer.transformer import Transformer

ADAPTED = ("attention.qkv_proj", "attention.o_proj", "mlp.up_proj", "mlp.down_proj")  # of a layer


class Update(NamedTuple):
    """What an adapter adds to some columns of one matrix's output, from ``first`` on."""

    first: int
    a: nn.Module  # [T, K] → [T, rank]
    b: nn.Module  # [T, rank] → [T, N]
    scale: float

    def add_to(self, out: Tensor, x: Tensor) -> None:
        added: Tensor = self.b(self.a(x)) * self.scale
        out[:, self.first : self.first + added.shape[1]] += added


Adapter = Mapping[str, Sequence[Update]]  # by the name of the module whose output it changes


class _Step:
    """Which rows of the next forward pass are whose. One object, read by every ``LoRALinear``."""

    def __init__(self) -> None:
        self.groups: Sequence[tuple[Adapter, Tensor]] = ()


class LoRALinear(nn.Module):
    """A linear layer, of whatever kind, and the updates of a step's adapters."""

    def __init__(self, linear: nn.Module, name: str, step: _Step) -> None:
        super().__init__()
        self.linear = linear
        self._name = name
        self._step = step

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] → [T, N]. An adapter's rows are taken out, so their bits do not depend on others'."""
        out: Tensor = self.linear(x)
        for adapter, rows in self._step.groups:
            if updates := adapter.get(self._name):
                own_x, own_out = x[rows], out[rows]
                for update in updates:
                    update.add_to(own_out, own_x)
                out[rows] = own_out
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
        rows: dict[str, list[Tensor]] = {}
        start = 0
        for adapter_id, count in spans if self._loaded else ():
            if adapter_id:
                rows.setdefault(adapter_id, []).append(torch.arange(start, start + count))
            start += count
        device = _device(self._model)
        self._step.groups = [(self._loaded[name], torch.cat(own).to(device)) for name, own in rows.items()]


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


def update(first: int, a: Tensor, b: Tensor, scale: float, model: Transformer) -> Update:
    """a [rank, K], b [N, rank], made ready for the device of ``model``."""
    return Update(first, _linear(a, model), _linear(b, model), scale)


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
