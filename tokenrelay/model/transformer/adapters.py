"""The adapters in memory, and which rows of a step are whose. A step without adapters runs as if there were none."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain

import torch

from tokenrelay.model.transformer.kernels.native_layers import NativeAdapter, NativeLayers
from tokenrelay.model.transformer.lora import ADAPTED, Adapter, LoRALinear, Rows, Step, device_of
from tokenrelay.model.transformer.transfer import to_device
from tokenrelay.model.transformer.transformer import Transformer


class Adapters:
    """The adapters in memory, by id. ``use`` tells, before every forward pass, which rows are whose."""

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._device = device_of(model)
        self._loaded: dict[str, Adapter] = {}
        self._step = Step()
        self._attached = False
        self._native = model.run_layers if isinstance(model.run_layers, NativeLayers) else None
        self._prepared: dict[str, NativeAdapter] = {}  # for it

    def __contains__(self, adapter_id: str) -> bool:
        return adapter_id in self._loaded

    def add(self, adapter_id: str, adapter: Adapter) -> None:
        """The first one costs every matrix a wrapper; until then the network is as it was loaded."""
        if not self._attached:
            _attach(self._model, self._step)
            self._attached = True
        self._loaded[adapter_id] = adapter
        if self._native:
            self._prepared[adapter_id] = NativeAdapter(adapter, len(self._model.layers))

    def remove(self, adapter_id: str) -> None:
        del self._loaded[adapter_id]
        self._prepared.pop(adapter_id, None)

    @property
    def in_use(self) -> bool:
        """Whether the next forward pass has rows of one."""
        return bool(self._step.groups)

    def use(self, spans: Sequence[tuple[str, int]]) -> None:
        """``spans``: the adapter's id ("": none) and the number of rows of each request, in the order of the rows."""
        if not self._loaded and not self.in_use:
            return
        starts = accumulate((count for _, count in spans), initial=0)
        rows: dict[str, list[range]] = {}
        for start, (adapter_id, count) in zip(starts, spans, strict=False):
            if adapter_id:
                _append(rows.setdefault(adapter_id, []), range(start, start + count))
        self._step.groups = [(self._loaded[name], _rows(own, self._device)) for name, own in rows.items()]
        if self._native:
            self._native.adapt([(self._prepared[name], span) for name, own in rows.items() for span in own])


def _append(ranges: list[range], last: range) -> None:
    """What follows the last range makes it longer."""
    if ranges and ranges[-1].stop == last.start:
        last = range(ranges.pop().start, last.stop)
    ranges.append(last)


def _rows(ranges: Sequence[range], device: torch.device) -> Rows:
    """A slice needs no copies."""
    if len(ranges) == 1:
        return slice(ranges[0].start, ranges[0].stop)
    return to_device(torch.tensor([*chain(*ranges)]), device)


def _attach(model: Transformer, step: Step) -> None:
    """Wrap the matrices, for when the layers run one by one."""
    for number, layer in enumerate(model.layers):
        for name in ADAPTED:
            parent, _, child = name.partition(".")
            block = getattr(layer, parent)
            if (linear := getattr(block, child, None)) is not None:  # an MLP of experts has none
                setattr(block, child, LoRALinear(linear, f"layers.{number}.{name}", step))
