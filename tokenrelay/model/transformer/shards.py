"""A matrix as it came: rows of several tensors, in many bits or few, taken together a block at a time.

So packing and rounding never have a whole matrix in memory beside its replacement, but what is mapped from a file, and
a few megabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from tokenrelay.model.quantized import Quantized, quantize, stacked
from tokenrelay.model.transformer.kernels.packed_linear import PackedLinear, QuantizedLinear
from tokenrelay.model.transformer.kernels.reference import PANEL_WIDTH

Packed = TypeVar("Packed", PackedLinear, QuantizedLinear)
_BLOCK = 1 << 18  # elements


class Shards:
    """W [N, K] of parts that follow each other, by the row each begins at; those of many bits become ``dtype``.

    ``bits``: 8 or 4 if all parts came in so many, 8 if in either, None if one came in more.
    """

    def __init__(self, parts: Mapping[int, Tensor | Quantized], dtype: torch.dtype) -> None:
        self._parts, self._dtype = dict(sorted(parts.items())), dtype
        last, rows = max(self._parts), self._parts[max(self._parts)].shape[0]
        self.shape = torch.Size((last + rows, self._parts[last].shape[1]))
        kinds = {part.bits if isinstance(part, Quantized) else None for part in self._parts.values()}
        few = kinds - {None}
        self.bits: int | None = None if kinds != few else few.pop() if len(few) == 1 else 8

    def blocks(self) -> Iterator[tuple[int, Tensor | Quantized]]:
        """Whole panels of rows, and the row each begins at."""
        step = max(_BLOCK // self.shape[1] // PANEL_WIDTH, 1) * PANEL_WIDTH
        for start in range(0, self.shape[0], step):
            yield start, self._rows(start, start + step)

    def _rows(self, start: int, end: int) -> Tensor | Quantized:
        pieces = [
            _cut(part, max(start - at, 0), min(end - at, part.shape[0]))
            for at, part in self._parts.items()
            if at < end and at + part.shape[0] > start
        ]
        if self.bits is None:
            return torch.cat([self._plain(piece) for piece in pieces])
        return stacked([self._in_few(piece) for piece in pieces])

    def _in_few(self, piece: Tensor | Quantized) -> Quantized:
        assert isinstance(piece, Quantized)
        return piece if piece.bits == self.bits else quantize(piece.dequantized())

    def _plain(self, piece: Tensor | Quantized) -> Tensor:
        return (piece.dequantized() if isinstance(piece, Quantized) else piece).to(self._dtype)


def _cut(part: Tensor | Quantized, start: int, end: int) -> Tensor | Quantized:
    if isinstance(part, Quantized):
        return part.mapped(lambda rows: rows.narrow(0, start, end - start))
    return part.detach().narrow(0, start, end - start)


def built(shards: Shards, build: Callable[[Tensor | Quantized, Tensor | None], Packed], bias: Tensor | None) -> Packed:
    """The layer of all rows and the bias, put together from those that ``build`` makes of blocks of rows."""
    blocks, all_rows = shards.blocks(), shards.shape[0]
    _, block = next(blocks)
    rows, whole = block.shape[0], build(block, bias)
    if rows == all_rows:
        return whole
    first = _stored(whole)
    for name, part in first.items():
        whole.register_buffer(name, _extended(part, -(-all_rows * len(part) // rows)))
    for start, block in blocks:
        for name, part in _stored(build(block, None)).items():
            at = start * len(first[name]) // rows  # rows, or panels of them
            whole.get_buffer(name).narrow(0, at, len(part)).copy_(part)
    whole.out_features = all_rows
    return whole


def _extended(part: Tensor, length: int) -> Tensor:
    memory = part.new_empty((length, *part.shape[1:]))
    memory.narrow(0, 0, len(part)).copy_(part)
    return memory


def _stored(layer: Packed) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in layer.named_buffers() if name != "bias"}
