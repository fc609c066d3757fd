"""GGUF's blocks of few bits as our kernels multiply them: integers, scales, minima of groups of 32.

Q8_0, Q4_0, Q4_1 and Q5_0 are taken apart without computing anything, Q4_K's scales are multiplied out. The others, of
up to 6 bits, are rounded to 8: a step of theirs is at least four of those.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGMLQuantizationType

from tokenrelay.model.quantized import Quantized

Blocks = npt.NDArray[np.uint8]

TAKEN_APART = (
    *(GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1),
    *(GGMLQuantizationType.Q5_0, GGMLQuantizationType.Q4_K),
)
NOT_QUANTIZED = (
    *(GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16, GGMLQuantizationType.F64),
    *(GGMLQuantizationType.I8, GGMLQuantizationType.I16, GGMLQuantizationType.I32, GGMLQuantizationType.I64),
)


def quantized_from(blocks: Blocks, kind: GGMLQuantizationType, shape: Sequence[int]) -> Quantized:
    """``blocks`` [number, bytes] of a matrix of this shape [N, K], or of a stack, of a kind that is taken apart.

    A block begins with its scale, in Q4_1 its minimum follows; of 4-bit integers the low halves of the bytes come
    before the high ones.
    """
    if kind is GGMLQuantizationType.Q4_K:
        return _q4_k(blocks, shape)
    scales = _halves(blocks[:, :2], shape)
    if kind is GGMLQuantizationType.Q8_0:
        return Quantized(torch.from_numpy(blocks[:, 2:].copy().view(np.int8)).view(*shape), scales)
    if kind is GGMLQuantizationType.Q5_0:
        return Quantized(_q5_0(blocks).view(*shape), scales)
    has_minima = kind is GGMLQuantizationType.Q4_1
    integers = _nibbles(blocks[:, 4 if has_minima else 2 :]).view(*shape)
    return Quantized(integers, scales, _halves(blocks[:, 2:4], shape) if has_minima else scales * -8)


def _q5_0(blocks: Blocks) -> torch.Tensor:
    """The fifth bits of 32 integers lie together before the other four."""
    fifth = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little")
    low = np.concatenate((blocks[:, 6:] & 15, blocks[:, 6:] >> 4), axis=1)
    return torch.from_numpy(low | fifth << 4).to(torch.int8) - 16


@np.errstate(all="ignore")  # a scale that is no number is passed on as it is
def _q4_k(blocks: Blocks, shape: Sequence[int]) -> Quantized:
    """Eight groups: a scale and a minimum for all, then 6 bits of each group's own, as factors of these."""
    scale, minimum = (blocks[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
    scales, minima = _six_bits(blocks[:, 4:16])
    integers = _nibbles(blocks[:, 16:].reshape(-1, 32)).view(*shape)
    factors = (torch.from_numpy(values).half().view(*shape[:-1], -1) for values in (scale * scales, -minimum * minima))
    return Quantized(integers, *factors)


def _six_bits(packed: Blocks) -> tuple[Blocks, Blocks]:
    """12 bytes -> 8 scales, 8 minima. Of the first four the 6 low bits of a byte; of the others the 2 high bits of
    these bytes, and the halves of the last four."""
    scales, minima, low = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    return (
        np.concatenate((scales & 63, low & 15 | scales >> 6 << 4), axis=1),
        np.concatenate((minima & 63, low >> 4 | minima >> 6 << 4), axis=1),
    )


def _nibbles(packed: Blocks) -> torch.Tensor:
    """[number, bytes] -> [number, 2 bytes]: the low halves of the bytes, then the high ones."""
    values = torch.from_numpy(packed.copy())
    return torch.cat((values & 15, values >> 4), dim=1)


def _halves(pairs: Blocks, shape: Sequence[int]) -> torch.Tensor:
    """Bytes -> fp16 [..., N, K / 32]."""
    return torch.from_numpy(pairs.copy().view(np.float16)).view(*shape[:-1], -1)
