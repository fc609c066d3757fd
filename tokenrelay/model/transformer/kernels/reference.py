"""Every operation in plain torch: obviously right, on any device, and the fallback where the native library is missing.

Promises the values, not the bits: torch's own matrix product may depend on the number of rows. Shapes are in the
package's docstring.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenrelay.model.quantized import GROUP, Quantized
from tokenrelay.model.transformer.kernels.reference_attention import (
    BLOCK_SIZE,
    kv_cache_shapes,
    paged_attention,
    rotate_and_cache,
)

__all__ = ["BLOCK_SIZE", "kv_cache_shapes", "paged_attention", "rotate_and_cache"]  # what has a file of its own

PANEL_WIDTH = 16
LARGEST_INPUT = 127
OUTLIER = 6  # times the row's root mean square
TINY = 1e-24  # below, a group counts as zero

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def pack(weight: Tensor) -> Tensor:
    """[N, K] -> panels [ceil(N / 16), K, 16], the last one padded with zero columns."""
    columns = _padded(weight).view(-1, PANEL_WIDTH, weight.shape[1])
    return columns.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _padded(weight: Tensor) -> Tensor:
    """With rows of zeros, until they fill panels."""
    missing = -len(weight) % PANEL_WIDTH
    return F.pad(weight, (0, 0, 0, missing)) if missing else weight


def unpack(panels: Tensor, out_features: int) -> Tensor:
    """The inverse of ``pack``."""
    return panels.transpose(1, 2).reshape(-1, panels.shape[1]).narrow(0, 0, out_features)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, scales: Tensor | None = None) -> Tensor:
    plain = unpack(weight, out_features) if weight.dim() == 3 else weight
    if scales is not None:
        plain = Quantized(plain, unpack(scales, out_features) if scales.dim() == 3 else scales).dequantized()
    return F.linear(x, plain.to(x.dtype), None if bias is None else bias.to(x.dtype))


def pack_integers(integers: Tensor) -> Tensor:
    """[N, K], K a multiple of 8 -> uint8 panels of 16 columns.

    int8: the values plus 128 [ceil(N / 16), K / 4, 16, 4]. 4-bit values (uint8): [ceil(N / 16), K / 8, 16, 4], of eight
    steps the last four in the high halves of the bytes.
    """
    in_features = integers.shape[1]
    unsigned = integers.view(torch.uint8) ^ 128 if integers.dtype is torch.int8 else integers
    panels = _padded(unsigned).view(-1, PANEL_WIDTH, in_features // 4, 4)
    if integers.dtype is torch.uint8:
        first, second = panels.view(-1, PANEL_WIDTH, in_features // 8, 2, 4).unbind(3)
        panels = (second << 4).bitwise_or_(first)
    return panels.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def unpack_integers(panels: Tensor, out_features: int, bits: int) -> Tensor:
    """The inverse of ``pack_integers``, as int16."""
    columns = panels.transpose(1, 2)
    if bits == 4:
        columns = torch.stack((columns & 15, columns >> 4), dim=3).flatten(2, 3)
    integers = columns.reshape(-1, columns.shape[2] * 4).narrow(0, 0, out_features).to(torch.int16)
    return integers if bits == 4 else integers - 128


def quantized_rows(panels: Tensor, scales: Tensor, minima: Tensor | None, ids: Tensor, in_features: int) -> Tensor:
    one_wide = panel_rows(panels, ids).unsqueeze(2)  # each a panel of one column
    integers = unpack_integers(one_wide, len(ids), 8 if minima is None else 4)
    minima = None if minima is None else panel_rows(minima, ids)
    return Quantized(integers, panel_rows(scales, ids), minima).dequantized()


def panel_rows(stored: Tensor, ids: Tensor) -> Tensor:
    """Of a matrix [N, ...] or of its panels [ceil(N / 16), ..., 16, ...]: rows are a panel's columns."""
    if stored.dim() == 2:
        return stored.index_select(0, ids)
    return stored[ids // PANEL_WIDTH, :, ids % PANEL_WIDTH]


def quantized_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] -> integers [T, K / 32, 32], as fp32, and a scale for each group [T, K / 32].

    A group's largest element becomes 127, but none counts as more than 6 times the row's root mean square: what is
    beyond, an outlier, gets a larger integer. What is not finite makes its whole row NaN.
    """
    groups = x.float().view(x.shape[0], -1, GROUP)
    squares = groups.square().sum((1, 2), keepdim=True)
    limit = torch.where(squares > 1e-30, OUTLIER * (squares / x.shape[1]).sqrt(), torch.inf)
    top = groups.abs().amax(-1, keepdim=True).minimum(limit)
    integers = torch.where(top > TINY, (groups * (LARGEST_INPUT / top)).round(), 0.0)
    scales = torch.where(top > TINY, top / LARGEST_INPUT, 0.0).where(squares.isfinite(), torch.nan)
    return integers.nan_to_num(0.0), scales.squeeze(-1)


def quantized_linear(
    x: Tensor, panels: Tensor, scales: Tensor, minima: Tensor | None, bias: Tensor | None, out_features: int
) -> Tensor:
    integers, x_scales = quantized_activations(x)
    weight = unpack_integers(panels, out_features, 8 if minima is None else 4).view(out_features, -1, GROUP)
    sums = torch.einsum("tgk,ngk->tng", integers.double(), weight.double())  # exact
    out = torch.einsum("tng,tg,ng->tn", sums, x_scales.double(), unpack(scales, out_features).double())
    if minima is not None:
        out += (x_scales.double() * integers.sum(-1).double()) @ unpack(minima, out_features).double().T
    return (out if bias is None else out + bias.double()).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(residual.add_(x), weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x.float(), (x.shape[-1],), weight.float(), None if bias is None else bias.float(), eps).to(
        x.dtype
    )


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return layer_norm(residual.add_(x), weight, bias, eps)


def head_norm(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, num_heads: int, num_kv_heads: int, eps: float) -> None:
    head_dim = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    q, k, _ = torch.split(qkv, [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim], dim=1)
    for x, weight in ((q, q_weight), (k, k_weight)):
        heads = x.view(len(x), -1, len(weight))  # or all of them as one
        heads.copy_(rms_norm(heads, weight, eps))


def activation(x: Tensor, kind: str) -> Tensor:
    return ACTIVATIONS[kind](x)


def gated_activation(x: Tensor, kind: str) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return _swiglu_oai(gate, up) if kind == "swiglu_oai" else ACTIVATIONS[kind](gate) * up


def argmax(x: Tensor) -> Tensor:
    return x.argmax(dim=-1)


def _swiglu_oai(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)
