"""Blocks of any bits, as no rounding would write them, and networks whose matrices they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import PreTrainedModel

from tests.model.weights.gguf_writer import Encoded, gguf_tensors, is_quantized, write_encoded

Bytes = npt.NDArray[np.uint8]

# Where a block's fp16 scale is, and its minimum's after it; all else may be any bits.
SCALES: dict[Kind, tuple[int, ...]] = {
    Kind.Q4_0: (0,),
    Kind.Q4_1: (0, 2),
    Kind.Q5_0: (0,),
    Kind.Q5_1: (0, 2),
    Kind.Q8_0: (0,),
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
    Kind.IQ2_XXS: (0,),
    Kind.IQ3_S: (0,),
    Kind.IQ4_NL: (0,),
    Kind.IQ4_XS: (0,),
    Kind.TQ2_0: (64,),
    Kind.MXFP4: (),
}
_SIZE = 1 / 16  # of values: products of rows of 256 are of the size of what they multiply


def random_blocks(kind: Kind, number: int, random_: np.random.Generator) -> Bytes:
    """[number, bytes]. Values are of one size, whatever the kind; scales have either sign."""
    blocks = random_.integers(0, 256, (number, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    if kind is Kind.MXFP4:
        blocks[:, 0] = random_.integers(120, 123, number)  # a power of two, of which 128 is the first
        return blocks
    scales = random_.uniform(-1, 1, (number, len(SCALES[kind])))
    _set_scales(blocks, kind, scales)
    _set_scales(blocks, kind, scales * _SIZE / dequantize(blocks, kind).std())
    return blocks


def _set_scales(blocks: Bytes, kind: Kind, scales: npt.NDArray[np.float64]) -> None:
    for at, values in zip(SCALES[kind], scales.T, strict=True):
        blocks[:, at : at + 2] = values.astype(np.float16)[:, None].view(np.uint8)


def write_blocks(model: PreTrainedModel, path: Path, kinds: Sequence[Kind]) -> Path:
    """Matrices of random blocks, of these kinds in turn. The network gets the values that they mean.

    Where these belong is found by writing the network's own places in their stead.
    """
    values, places = parameters_to_vector(model.parameters()).detach(), copy.deepcopy(model)
    assert len(values) < 1 << 24, "fp32 cannot number so many"
    vector_to_parameters(torch.arange(len(values), dtype=torch.float32), places.parameters())
    blocks = dict(_blocks(places, kinds, values))
    vector_to_parameters(values, model.parameters())
    return write_encoded(model.config, path, (_encoded(name, own, blocks) for name, own in gguf_tensors(model)))


def _blocks(places: PreTrainedModel, kinds: Sequence[Kind], values: torch.Tensor) -> Iterator[tuple[str, Encoded]]:
    """Each matrix' bytes by its name; what they mean goes where it belongs in ``values``."""
    random_, turns = np.random.default_rng(0), cycle(kinds)
    for name, own in gguf_tensors(places):
        if is_quantized(name, own):
            kind = next(turns)
            number = own.numel() // GGML_QUANT_SIZES[kind][0]
            rows = random_blocks(kind, number, random_).reshape(*own.shape[:-1], -1)
            values[own.long()] = torch.from_numpy(dequantize(rows, kind))
            yield name, (name, rows, kind)


def _encoded(name: str, own: torch.Tensor, blocks: dict[str, Encoded]) -> Encoded:
    return blocks.get(name) or (name, np.ascontiguousarray(own.numpy()), Kind.F32)
