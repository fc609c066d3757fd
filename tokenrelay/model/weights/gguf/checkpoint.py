"""Tensors of a GGUF file, dequantized one at a time, under the names and in the layout that ``gguf_rules`` knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
import structlog
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.quantized import CHUNK, GROUP, Quantized, quantize
from tokenrelay.model.weights.gguf.config import config_from_gguf
from tokenrelay.model.weights.gguf.header import TensorInfo
from tokenrelay.model.weights.gguf.metadata import GGUFMetadata, read_gguf_metadata
from tokenrelay.model.weights.gguf.quantized import NOT_QUANTIZED, TAKEN_APART, quantized_from
from tokenrelay.model.weights.gguf.rules import gguf_rules

_values = np.errstate(all="ignore")(dequantize)  # a scale that is no number is passed on as it is

Bytes = npt.NDArray[np.uint8]


class GGUFCheckpoint:
    """A GGUF file, or all parts of a split one, memory-mapped.

    Raises:
        CheckpointError: the header contradicts itself or claims more than the file holds.
        UnsupportedModelError: a network this server cannot run.
    """

    def __init__(self, path: Path) -> None:
        self._metadata = read_gguf_metadata(path)
        self._config = config_from_gguf(self._metadata)
        self.rules = gguf_rules(self._metadata, self._config)
        paths = {info.path for info in self._metadata.tensors.values()}
        self._data: dict[Path, Bytes] = {path: np.memmap(path, mode="r", dtype=np.uint8) for path in paths}
        for info in self._metadata.tensors.values():
            _blocks(info, self._data[info.path], self._metadata)

    def config(self) -> ModelConfig:
        return self._config

    def tensors(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor once, in file order; raises CheckpointError naming a tensor that cannot be read."""
        for name, info in self._metadata.tensors.items():
            yield name, _dequantized(info, self._data[info.path], self._metadata, dtype)

    def stored(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, torch.Tensor | Quantized]]:
        """As ``tensors``, but quantized matrices, and experts' stacks of them, come in 4 or 8 bits: as they are, or as
        near as can be told."""
        kinds: Counter[str] = Counter()
        for name, info in self._metadata.tensors.items():
            data = self._data[info.path]
            kind, blocks = _blocks(info, data, self._metadata)
            if kind in NOT_QUANTIZED or len(info.shape) < 2:
                yield name, _dequantized(info, data, self._metadata, dtype)
                continue
            exact = kind in TAKEN_APART
            stored = quantized_from(blocks, kind, info.shape) if exact else _in_8_bits(info, data, self._metadata)
            kinds[f"{kind.name} in {stored.bits} bits"] += 1
            yield name, stored
        if kinds:
            became = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            structlog.get_logger().info("quantized matrices", became=became)


def _in_8_bits(info: TensorInfo, data: Bytes, metadata: GGUFMetadata) -> Quantized:
    integers = torch.empty(info.shape, dtype=torch.int8)
    scales = torch.empty(*info.shape[:-1], info.shape[-1] // GROUP, dtype=torch.float16)
    chunks = torch.split(integers.view(-1), CHUNK), torch.split(scales.view(-1), CHUNK // GROUP)
    for values, *chunk in zip(_pieces(info, data, metadata), *chunks, strict=True):
        rounded = quantize(values.view(1, -1))
        chunk[0].copy_(rounded.integers[0])
        chunk[1].copy_(rounded.scales[0])
    return Quantized(integers, scales)


def _dequantized(info: TensorInfo, data: Bytes, metadata: GGUFMetadata, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in ``dtype``, filled piece by piece so that no second copy of it is ever in memory."""
    values = torch.empty(info.shape, dtype=dtype)
    for piece, dequantized in zip(torch.split(values.view(-1), CHUNK), _pieces(info, data, metadata), strict=True):
        piece.copy_(dequantized)
    return values


def _pieces(info: TensorInfo, data: Bytes, metadata: GGUFMetadata) -> Iterator[torch.Tensor]:
    """All elements in order, fp32, ``CHUNK`` at a time.

    A call per row would cost four times as much, and torch does not split so few among threads, which would wait for
    each other.
    """
    kind, blocks = _blocks(info, data, metadata)
    blocks_per_piece = CHUNK // GGML_QUANT_SIZES[kind][0]
    try:
        for start in range(0, len(blocks), blocks_per_piece):
            chunk = np.array(blocks[start : start + blocks_per_piece])
            yield torch.from_numpy(_values(chunk.reshape(1, -1), kind).ravel())
    except NotImplementedError as error:
        raise metadata.error(f"tensor {info.name!r} has type {kind.name}, which cannot be dequantized") from error


def _blocks(info: TensorInfo, data: Bytes, metadata: GGUFMetadata) -> tuple[GGMLQuantizationType, Bytes]:
    """The tensor's bytes as [blocks, bytes per block], after checking that the file has them."""
    try:
        kind = GGMLQuantizationType(info.ggml_type)
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise metadata.error(f"tensor {info.name!r} has unknown type {info.ggml_type}") from None
    if info.shape[-1] % block_size:
        raise metadata.error(f"tensor {info.name!r}: rows of {info.shape[-1]} do not divide into {kind.name} blocks")
    end = info.offset + prod(info.shape) // block_size * block_bytes
    if end > len(data):
        raise metadata.error(f"tensor {info.name!r} ends at byte {end}, but the file at {len(data)}: truncated")
    return kind, data[info.offset : end].reshape(-1, block_bytes)
