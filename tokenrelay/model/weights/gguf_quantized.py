"""GGUF's blocks of 32 elements, taken apart without computing anything: integers, scales, minima."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGMLQuantizationType

from tokenrelay.model.quantized import Quantized

Blocks = npt.NDArray[np.uint8]

STORED = (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1)


def quantized_from(blocks: Blocks, kind: GGMLQuantizationType, shape: Sequence[int]) -> Quantized:
    """``blocks`` [number, bytes] of a matrix of this shape [N, K]. A block begins with its scale, in Q4_1 its minimum
    follows; of 4-bit integers the low halves of the bytes come before the high ones."""
    scales = _halves(blocks[:, :2], shape)
    if kind is GGMLQuantizationType.Q8_0:
        return Quantized(torch.from_numpy(blocks[:, 2:].copy().view(np.int8)).view(*shape), scales)
    has_minima = kind is GGMLQuantizationType.Q4_1
    packed = torch.from_numpy(blocks[:, 4 if has_minima else 2 :].copy())
    integers = torch.cat((packed & 15, packed >> 4), dim=1).view(*shape)
    return Quantized(integers, scales, _halves(blocks[:, 2:4], shape) if has_minima else scales * -8)


def _halves(pairs: Blocks, shape: Sequence[int]) -> torch.Tensor:
    """Bytes -> fp16 [N, K / 32]."""
    return torch.from_numpy(pairs.copy().view(np.float16)).view(shape[0], -1)
