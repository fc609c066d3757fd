"""The CPU operations through the native library (``library``).

Promises batch invariance: an output row has the same bits whatever else is in the call, on any number of threads and
any instruction set. Activations are fp32; weights bf16 or fp32, the cache fp32, int16 or int8. What the kernels do not
cover (other dtypes, heads above 256) goes to the torch reference, which does not promise that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokenrelay.model.quantized import GROUP
from tokenrelay.model.transformer.kernels import library, reference
from tokenrelay.model.transformer.kernels.native_attention import head_norm, paged_attention, rotate_and_cache

__all__ = ["head_norm", "paged_attention", "rotate_and_cache"]  # the operations that have a file of their own

ISA_NAMES = ("portable", "avx2", "avx512")
ACTIVATION_KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4, "swiglu_oai": 5}
STORED = (torch.bfloat16, torch.float32)


def is_available() -> bool:
    return library.LIBRARY is not None


def why_unavailable() -> str:
    """A sentence for the log, empty if the library is in use."""
    if is_available():
        return ""
    return (
        f"The native CPU kernels are not in use: {library.REASON}. Running on plain torch: several times slower, "
        "and output may depend on what else is in the batch."
    )


def isa() -> str:
    """The instruction set in use: "avx512", "avx2" or "portable"; "none" without the library."""
    return ISA_NAMES[library.LIBRARY.tr_isa()] if library.LIBRARY else "none"


def set_isa(name: str) -> bool:
    """For tests: use another instruction set. False if this processor lacks it."""
    return library.LIBRARY is not None and library.LIBRARY.tr_set_isa(ISA_NAMES.index(name)) == 0


def set_num_threads(count: int) -> None:
    if library.LIBRARY:
        library.LIBRARY.tr_set_num_threads(count)


def num_threads() -> int:
    return int(library.LIBRARY.tr_num_threads()) if library.LIBRARY else torch.get_num_threads()


def _suits(x: Tensor, stored: Tensor, other: Tensor | None = None) -> bool:
    """Dense fp32 activations, and weights or cache of one dtype that the kernels read."""
    return (
        x.dtype is torch.float32
        and x.is_contiguous()
        and stored.dtype in STORED
        and stored.is_contiguous()
        and (other is None or (other.dtype is stored.dtype and other.is_contiguous()))
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, scales: Tensor | None = None) -> Tensor:
    x = x.contiguous()
    suits = _suits(x, weight) or (scales is not None and x.dtype is torch.float32)
    if weight.dim() != 3 or not suits or (bias is not None and bias.dtype is not torch.float32):
        return reference.linear(x, weight, bias, out_features, scales)
    rows, in_features = x.shape
    out = x.new_empty((rows, out_features))
    library.linear(
        x.data_ptr(),
        weight.data_ptr(),
        library.address(scales, torch.float16),
        library.address(bias, torch.float32),
        out.data_ptr(),
        rows,
        in_features,
        out_features,
        8 * weight.itemsize,
    )
    return out


def scratch_size(in_features: int) -> int:
    """Bytes per row: integers; scales and sums of each group, and room for an outlier and for where a block's end."""
    return in_features + 32 * in_features // GROUP


def quantized_linear(
    x: Tensor, panels: Tensor, scales: Tensor, minima: Tensor | None, bias: Tensor | None, out_features: int
) -> Tensor:
    x = x.contiguous()
    if x.dtype is not torch.float32:
        return reference.quantized_linear(x, panels, scales, minima, bias, out_features)
    rows, in_features = x.shape
    out = x.new_empty((rows, out_features))
    scratch = x.new_empty(rows * scratch_size(in_features), dtype=torch.uint8)
    library.quantized_linear(
        library.QuantizedLinear(
            x.data_ptr(),
            library.address(panels, torch.uint8),
            library.address(scales, torch.float16),
            library.address(minima, torch.float16),
            library.address(bias, torch.float32),
            out.data_ptr(),
            scratch.data_ptr(),
            rows,
            in_features,
            out_features,
            8 if minima is None else 4,
        )
    )
    return out


def quantized_rows(panels: Tensor, scales: Tensor, minima: Tensor | None, ids: Tensor, in_features: int) -> Tensor:
    out = torch.empty((ids.shape[0], in_features))
    library.quantized_rows(
        library.QuantizedRows(
            library.address(panels, torch.uint8),
            library.address(scales, torch.float16),
            library.address(minima, torch.float16),
            library.address(ids, torch.int64),
            out.data_ptr(),
            *out.shape,
        )
    )
    return out


def _norm(
    function: Callable[..., None], x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    out = torch.empty_like(x)
    function(
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        x.shape[1],
        eps,
        weight.dtype is torch.bfloat16,
    )
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    return (
        _norm(library.rms_norm, x, None, weight, None, eps) if _suits(x, weight) else reference.rms_norm(x, weight, eps)
    )


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    if not (_suits(x, weight) and _suits(residual, weight)):
        return reference.add_rms_norm(x, residual, weight, eps)
    return _norm(library.rms_norm, x, residual, weight, None, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    x = x.contiguous()
    if not _suits(x, weight, bias):
        return reference.layer_norm(x, weight, bias, eps)
    return _norm(library.layer_norm, x, None, weight, bias, eps)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    x = x.contiguous()
    if not (_suits(x, weight, bias) and _suits(residual, weight)):
        return reference.add_layer_norm(x, residual, weight, bias, eps)
    return _norm(library.layer_norm, x, residual, weight, bias, eps)


def activation(x: Tensor, kind: str) -> Tensor:
    x = x.contiguous()
    if x.dtype is not torch.float32 or kind not in reference.ACTIVATIONS:  # which then refuses it
        return reference.activation(x, kind)
    out = torch.empty_like(x)
    library.activation(x.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], ACTIVATION_KINDS[kind], False)
    return out


def argmax(x: Tensor) -> Tensor:
    if x.dtype is not torch.float32 or not x.is_contiguous():
        return reference.argmax(x)
    best = x.new_empty(x.shape[0], dtype=torch.int64)
    library.argmax(x.data_ptr(), best.data_ptr(), *x.shape)
    return best


def gated_activation(x: Tensor, kind: str) -> Tensor:
    x = x.contiguous()
    if x.dtype is not torch.float32:
        return reference.gated_activation(x, kind)
    rows, columns = x.shape[0], x.shape[1] // 2
    out = x.new_empty((rows, columns))
    library.activation(x.data_ptr(), out.data_ptr(), rows, columns, ACTIVATION_KINDS[kind], True)
    return out
