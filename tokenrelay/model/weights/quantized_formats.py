"""How AWQ, GPTQ, compressed-tensors and MXFP4 lay a matrix of few bits out in several tensors, and what it means.

Each function takes one matrix's tensors by their suffixes and gives integers, zero points and scales. A tensor of the
wrong shape or type is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenrelay.model.quantized import GROUP, Quantized
from tokenrelay.model.weights.errors import CheckpointError

WORD = 32
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # which four bits of a word hold its first column, its second …
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class GroupedIntegers(NamedTuple):
    """W[n, k] = (integers[n, k] - zeros[n, g]) * scales[n, g], with g the group of k. [N, K] and [N, groups]"""

    integers: Tensor  # uint8
    zeros: Tensor  # int32
    scales: Tensor
    bits: int
    groups: Tensor | None = None  # of each k, if not equal runs in order: "act-order"

    def dequantized(self) -> Tensor:
        """[N, K] fp32."""
        columns, number = self.integers.shape[1], self.scales.shape[1]
        size = -(-columns // number)
        groups = torch.arange(columns) // size if self.groups is None else self.groups.long()
        return (self.integers - self.zeros[:, groups]) * self.scales.float()[:, groups]

    def kept(self) -> Quantized | str:
        """As our kernels take it, or why they do not."""
        size, rest = divmod(self.integers.shape[1], self.scales.shape[1])
        if self.groups is not None:
            return "act-order"
        if rest or size % GROUP:
            return "groups that are no multiples of 32"
        scales = self.scales.float().repeat_interleave(size // GROUP, dim=1)
        zeros = self.zeros.repeat_interleave(size // GROUP, dim=1)
        if self.bits == 4:
            return Quantized(self.integers, scales.half(), (scales * -zeros).half())
        if (self.zeros != 128).any():
            return "8 bits with zero points"
        return Quantized((self.integers.int() - 128).to(torch.int8), scales.half())


class Parts:
    """One matrix's tensors by their suffixes; ``name`` is what they have in common."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.name, self.tensors = name, tensors

    def __contains__(self, suffix: str) -> bool:
        return suffix in self.tensors

    def get(self, suffix: str, *shape: int | None, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of this shape (None: any size) and type. CheckpointError names one that is not so."""
        if suffix not in self.tensors:
            raise CheckpointError(f"tensor {self.name + suffix!r} is missing, which belongs to {self._another()!r}")
        tensor = self.tensors[suffix]
        fits = len(shape) == tensor.dim() and all(
            want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
        )
        if not fits or (dtype or tensor.dtype) is not tensor.dtype:
            expected = [size if size is not None else "any" for size in shape]
            raise CheckpointError(
                f"tensor {self.name + suffix!r} is {tensor.dtype} of shape {list(tensor.shape)}, "
                f"expected {dtype or 'any type'} of shape {expected}"
            )
        return tensor

    def _another(self) -> str:
        return self.name + next(iter(self.tensors))


def unpacked(words: Tensor, bits: int, order: Sequence[int] = ()) -> Tensor:
    """int32 [..., W] -> uint8 [..., 32 W / bits]: a word's lowest bits are its first number, or as ``order`` says."""
    shifts = torch.tensor([bits * i for i in order or range(WORD // bits)], dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(-2)


def awq(parts: Parts, config: Mapping[str, Any]) -> GroupedIntegers:
    """qweight [K, N / 8], qzeros [groups, N / 8], scales [groups, N]."""
    words = parts.get(".qweight", None, None, dtype=torch.int32)
    columns, rows = words.shape[0], words.shape[1] * 8
    groups = _number_of_groups(columns, config)
    zeros = unpacked(parts.get(".qzeros", groups, rows // 8, dtype=torch.int32), 4, _AWQ_ORDER)
    scales = parts.get(".scales", groups, rows)
    return GroupedIntegers(unpacked(words, 4, _AWQ_ORDER).T.contiguous(), zeros.T.int(), scales.T, 4)


def gptq(parts: Parts, config: Mapping[str, Any]) -> GroupedIntegers:
    """qweight [K bits / 32, N], qzeros [groups, N bits / 32], scales [groups, N], and perhaps g_idx [K].

    Zero points are stored less one, except in the format's second version.
    """
    bits = int(config["bits"])
    words = parts.get(".qweight", None, None, dtype=torch.int32)
    columns, rows = words.shape[0] * WORD // bits, words.shape[1]
    number = _number_of_groups(columns, config)
    zeros = unpacked(parts.get(".qzeros", number, rows * bits // WORD, dtype=torch.int32), bits).T.int()
    if config.get("checkpoint_format") != "gptq_v2":
        zeros = (zeros + 1) & ((1 << bits) - 1)
    scales = parts.get(".scales", number, rows).T
    groups = _order(parts, ".g_idx", columns, number)
    return GroupedIntegers(unpacked(words.T.contiguous(), bits), zeros, scales, bits, groups)


def compressed_tensors(parts: Parts, config: Mapping[str, Any]) -> GroupedIntegers:
    """weight int8 [N, K], or weight_packed [N, K bits / 32] and weight_shape; weight_scale [N, groups], and perhaps
    weight_zero_point, in packed files of words along N. All integers are signed, when packed stored with half their
    range added."""
    bits = int(config["num_bits"])
    middle = 1 << (bits - 1)
    if ".weight_packed" in parts:
        rows, columns = parts.get(".weight_shape", 2).tolist()
        per_word = WORD // bits
        words = parts.get(".weight_packed", rows, -(-columns // per_word), dtype=torch.int32)
        integers = unpacked(words, bits)[:, :columns].contiguous()
    else:
        signed = parts.get(".weight", None, None, dtype=torch.int8)
        rows, columns = signed.shape
        integers = (signed.int() + middle).to(torch.uint8)
    scales = _by_row(parts, ".weight_scale", rows)
    groups = _order(parts, ".weight_g_idx", columns, scales.shape[1])
    return GroupedIntegers(integers, _signed_zeros(parts, scales, bits) + middle, scales, bits, groups)


def _by_row(parts: Parts, suffix: str, rows: int, number: int | None = None) -> Tensor:
    """[N, groups], also of what is stored as one number for all or one for each row."""
    stored = parts.tensors.get(suffix)
    if stored is None or stored.dim() == 2:
        return parts.get(suffix, rows, number)
    alone = parts.get(suffix, *((1 if len(stored) == 1 else rows,) if stored.dim() else ()))
    return alone.reshape(-1, 1).expand(rows, 1)


def _signed_zeros(parts: Parts, scales: Tensor, bits: int) -> Tensor:
    (rows, number), suffix = scales.shape, ".weight_zero_point"
    if suffix not in parts:
        return torch.zeros(rows, number, dtype=torch.int32)
    if ".weight_packed" not in parts or parts.tensors[suffix].dtype is not torch.int32:
        return _by_row(parts, suffix, rows, number).int()
    words = parts.get(suffix, -(-rows * bits // WORD), number)
    return unpacked(words.T.contiguous(), bits).T[:rows].int() - (1 << (bits - 1))


def mxfp4(parts: Parts, config: Mapping[str, Any]) -> Tensor:
    """_blocks [E, N, K / 32, 16]: two floats of 4 bits in a byte, the low half first; _scales [E, N, K / 32]: powers of
    two -> [E, K, N], as transformers holds them."""
    blocks = parts.get("_blocks", None, None, None, 16, dtype=torch.uint8)
    exponents = parts.get("_scales", *blocks.shape[:3], dtype=torch.uint8).int() - 127
    return torch.stack([_floats(*expert) for expert in zip(blocks, exponents, strict=True)])


def _floats(blocks: Tensor, exponents: Tensor) -> Tensor:
    """[N, K / 32, 16] -> [K, N], exact in bf16."""
    numbers = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(2)
    floats = torch.tensor(_FP4, dtype=torch.bfloat16)[numbers.long()]
    return (floats * exponents.float().exp2().bfloat16().unsqueeze(-1)).flatten(1).T


def _number_of_groups(columns: int, config: Mapping[str, Any]) -> int:
    size = config.get("group_size") or -1
    if type(size) is not int:
        raise CheckpointError(f"quantization_config has group_size={size!r}, not a number")
    return 1 if size <= 0 else -(-columns // size)


def _order(parts: Parts, suffix: str, columns: int, number: int) -> Tensor | None:
    """The group of each k, unless they are equal runs in order."""
    if suffix not in parts:
        return None
    groups = parts.get(suffix, columns)
    if columns and not 0 <= int(groups.min()) <= int(groups.max()) < number:
        raise CheckpointError(f"tensor {parts.name + suffix!r} names groups that there are not: {number} in all")
    size = -(-columns // number)
    return None if torch.equal(groups.long(), torch.arange(columns) // size) else groups
