"""Tensors of a GGUF file, dequantized one at a time, under the names and in the layout that ``gguf_rules`` knows."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.quantized import Quantized
from tokenrelay.model.weights.gguf_config import config_from_gguf
from tokenrelay.model.weights.gguf_header import TensorInfo
from tokenrelay.model.weights.gguf_metadata import GGUFMetadata, read_gguf_metadata
from tokenrelay.model.weights.gguf_quantized import STORED, quantized_from
from tokenrelay.model.weights.gguf_rules import gguf_rules

# Elements dequantized at once: they fit the cache, a call per row would cost four times as much, and torch does not
# split so few among threads, which on a busy machine wait for each other.
_CHUNK = 1 << 15

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
        """As ``tensors``, but matrices in Q8_0, Q4_0 or Q4_1 come as they are."""
        for name, info in self._metadata.tensors.items():
            kind, blocks = _blocks(info, self._data[info.path], self._metadata)
            if kind in STORED and len(info.shape) == 2:
                yield name, quantized_from(blocks, kind, info.shape)
            else:
                yield name, _dequantized(info, self._data[info.path], self._metadata, dtype)


def _dequantized(info: TensorInfo, data: Bytes, metadata: GGUFMetadata, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in ``dtype``, filled piece by piece so that no second copy of it is ever in memory."""
    kind, blocks = _blocks(info, data, metadata)
    values = torch.empty(info.shape, dtype=dtype)
    pieces = torch.split(values.view(-1), _CHUNK)
    blocks_per_piece = _CHUNK // GGML_QUANT_SIZES[kind][0]
    try:
        for i, piece in enumerate(pieces):
            chunk = np.array(blocks[i * blocks_per_piece : (i + 1) * blocks_per_piece])
            piece.copy_(torch.from_numpy(dequantize(chunk.reshape(1, -1), kind).ravel()))
    except NotImplementedError as error:
        raise metadata.error(f"tensor {info.name!r} has type {kind.name}, which cannot be dequantized") from error
    return values


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
