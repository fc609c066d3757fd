"""The CPU operations through the native library (``cpp/*.cpp``, compiled at install, loaded with ctypes).

Promises batch invariance: an output row has the same bits whatever else is in the call, on any number of threads and
any instruction set. Activations are fp32; weights and cache bf16 or fp32. What the kernels do not cover (other dtypes,
heads above 256) goes to the torch reference, which does not promise that.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenrelay.model.transformer.kernels import reference

ISA_NAMES = ("portable", "avx2", "avx512")
ACTIVATION_KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
MAX_HEAD_DIM = 256
KEYS_PER_VECTOR = 16
STORED = (torch.bfloat16, torch.float32)


class _AttentionParams(ctypes.Structure):
    """``struct AttentionParams`` of native/interface.h, field by field."""

    _fields_ = [
        *((name, c_void_p) for name in ("q", "k_cache", "v_cache", "block_tables", "query_start", "seq_lens", "out")),
        *((name, c_int64) for name in ("num_requests", "max_blocks", "num_heads", "num_kv_heads", "head_dim")),
        *((name, c_int64) for name in ("block_size", "is_bf16")),
        ("scale", c_float),
        ("soft_cap", c_float),
        ("sliding_window", c_int64),
        ("sinks", c_void_p),
    ]


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason."""
    found = sorted(Path(__file__).parent.glob("_native*.so"))
    if not found:
        return None, "it was not built (no C++ compiler at install?)"
    try:
        library = ctypes.CDLL(str(found[0]))
    except OSError as error:
        return None, f"it does not load: {error}"
    if not library.tr_usable():
        return None, "this processor has no fused multiply-add (AVX2 and FMA, or arm64)"
    return library, ""


_LIBRARY, _REASON = _load()


def is_available() -> bool:
    return _LIBRARY is not None


def why_unavailable() -> str:
    """A sentence for the log, empty if the library is in use."""
    if is_available():
        return ""
    return (
        f"The native CPU kernels are not in use: {_REASON}. Running on plain torch: several times slower, "
        "and output may depend on what else is in the batch."
    )


def isa() -> str:
    """The instruction set in use: "avx512", "avx2" or "portable"; "none" without the library."""
    return ISA_NAMES[_LIBRARY.tr_isa()] if _LIBRARY else "none"


def set_isa(name: str) -> bool:
    """For tests: use another instruction set. False if this processor lacks it."""
    return _LIBRARY is not None and _LIBRARY.tr_set_isa(ISA_NAMES.index(name)) == 0


def set_num_threads(count: int) -> None:
    if _LIBRARY:
        _LIBRARY.tr_set_num_threads(count)


def num_threads() -> int:
    return int(_LIBRARY.tr_num_threads()) if _LIBRARY else torch.get_num_threads()


def _function(name: str, *argtypes: Any) -> Callable[..., None]:
    """A C function looked up once; a stub that no one calls where there is no library."""
    if _LIBRARY is None:
        return lambda *_: None
    function = getattr(_LIBRARY, name)
    function.argtypes = argtypes
    function.restype = None
    return function  # type: ignore[no-any-return]


_norm_arguments = (*(c_void_p,) * 5, c_int64, c_int64, c_float, c_int64)
_linear = _function("tr_linear", *(c_void_p,) * 4, *(c_int64,) * 4)
_rms_norm = _function("tr_rms_norm", *_norm_arguments)
_layer_norm = _function("tr_layer_norm", *_norm_arguments)
_rotate_and_cache = _function("tr_rotate_and_cache", *(c_void_p,) * 7, *(c_int64,) * 6)
_paged_attention = _function("tr_paged_attention", ctypes.POINTER(_AttentionParams))
_activation = _function("tr_activation", *(c_void_p,) * 2, *(c_int64,) * 4)
if _LIBRARY is not None:
    _LIBRARY.tr_set_num_threads.argtypes = (c_int,)


def _suits(x: Tensor, stored: Tensor, other: Tensor | None = None) -> bool:
    """Dense fp32 activations, and weights or cache of one dtype that the kernels read."""
    return (
        x.dtype is torch.float32
        and x.is_contiguous()
        and stored.dtype in STORED
        and stored.is_contiguous()
        and (other is None or (other.dtype is stored.dtype and other.is_contiguous()))
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    x = x.contiguous()
    if weight.dim() != 3 or not _suits(x, weight) or (bias is not None and bias.dtype is not torch.float32):
        return reference.linear(x, weight, bias, out_features)
    rows, in_features = x.shape
    out = x.new_empty((rows, out_features))
    bias_address = None if bias is None else bias.data_ptr()
    is_bf16 = weight.dtype is torch.bfloat16
    _linear(x.data_ptr(), weight.data_ptr(), bias_address, out.data_ptr(), rows, in_features, out_features, is_bf16)
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
    return _norm(_rms_norm, x, None, weight, None, eps) if _suits(x, weight) else reference.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    if not (_suits(x, weight) and _suits(residual, weight)):
        return reference.add_rms_norm(x, residual, weight, eps)
    return _norm(_rms_norm, x, residual, weight, None, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    x = x.contiguous()
    if not _suits(x, weight, bias):
        return reference.layer_norm(x, weight, bias, eps)
    return _norm(_layer_norm, x, None, weight, bias, eps)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    x = x.contiguous()
    if not (_suits(x, weight, bias) and _suits(residual, weight)):
        return reference.add_layer_norm(x, residual, weight, bias, eps)
    return _norm(_layer_norm, x, residual, weight, bias, eps)


def _address(x: Tensor, dtype: torch.dtype) -> int:
    """The address of an index tensor or table, which the caller owes us dense and of this dtype."""
    if x.dtype is not dtype or not x.is_contiguous():
        raise TypeError(f"expected a contiguous {dtype} tensor, got {x.dtype} with strides {x.stride()}")
    return x.data_ptr()


def _cache_suits(x: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    _, _, head_dim, block_size = k_cache.shape
    return _suits(x, k_cache, v_cache) and head_dim <= MAX_HEAD_DIM and block_size % KEYS_PER_VECTOR == 0


def rotate_and_cache(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    qkv = qkv.contiguous()
    if not _cache_suits(qkv, k_cache, v_cache):
        return reference.rotate_and_cache(
            qkv, positions, cos_sin, k_cache, v_cache, slot_mapping, num_heads, num_kv_heads
        )
    rows, (_, _, head_dim, block_size) = qkv.shape[0], k_cache.shape
    q = qkv.new_empty((rows, num_heads, head_dim))
    _rotate_and_cache(
        qkv.data_ptr(),
        _address(positions, torch.int64),
        None if cos_sin is None else _address(cos_sin, torch.float32),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        _address(slot_mapping, torch.int64),
        q.data_ptr(),
        rows,
        num_heads,
        num_kv_heads,
        head_dim,
        block_size,
        k_cache.dtype is torch.bfloat16,
    )
    return q


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> Tensor:
    q = q.contiguous()
    if not _cache_suits(q, k_cache, v_cache):
        return reference.paged_attention(q, k_cache, v_cache, block_tables, query_start_loc, seq_lens, scale)
    rows, num_heads, head_dim = q.shape
    out = q.new_empty((rows, num_heads * head_dim))
    params = _AttentionParams(
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        _address(block_tables, torch.int32),
        _address(query_start_loc, torch.int32),
        _address(seq_lens, torch.int32),
        out.data_ptr(),
        block_tables.shape[0],
        block_tables.shape[1],
        num_heads,
        k_cache.shape[1],
        head_dim,
        k_cache.shape[3],
        k_cache.dtype is torch.bfloat16,
        scale,
    )
    _paged_attention(params)
    return out


def activation(x: Tensor, kind: str) -> Tensor:
    x = x.contiguous()
    if x.dtype is not torch.float32:
        return reference.activation(x, kind)
    out = torch.empty_like(x)
    _activation(x.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], ACTIVATION_KINDS[kind], False)
    return out


def gated_activation(x: Tensor, kind: str) -> Tensor:
    x = x.contiguous()
    if x.dtype is not torch.float32:
        return reference.gated_activation(x, kind)
    rows, columns = x.shape[0], x.shape[1] // 2
    out = x.new_empty((rows, columns))
    _activation(x.data_ptr(), out.data_ptr(), rows, columns, ACTIVATION_KINDS[kind], True)
    return out
