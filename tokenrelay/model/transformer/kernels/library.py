"""The native library (``cpp/*.cpp``, compiled at install): found, loaded, and its C interface declared for ctypes.

The structures mirror ``cpp/interface.h`` field by field.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class KVCache(ctypes.Structure):
    """One layer's K and V; ``type`` is an index of ``enum CacheType``."""

    _fields_ = [
        *((name, c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
        *((name, c_int64) for name in ("key_stride", "value_stride")),
        *((name, c_int64) for name in ("num_kv_heads", "head_dim", "block_size", "type")),
    ]


class QuantizedLinear(ctypes.Structure):
    """What ``tr_quantized_linear`` reads and writes."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "panels", "scales", "minima", "bias", "out", "scratch")),
        *((name, c_int64) for name in ("rows", "in_features", "out_features", "bits")),
    ]


class QuantizedRows(ctypes.Structure):
    """What ``tr_quantized_rows`` reads and writes."""

    _fields_ = [
        *((name, c_void_p) for name in ("panels", "scales", "minima", "ids", "out")),
        *((name, c_int64) for name in ("rows", "in_features")),
    ]


class HeadNormParams(ctypes.Structure):
    """What ``tr_head_norm`` reads and writes."""

    _fields_ = [
        *((name, c_void_p) for name in ("qkv", "q_weight", "k_weight")),
        *((name, c_int64) for name in ("num_tokens", "q_size", "kv_size", "q_width", "k_width")),
        ("eps", c_float),
    ]


class RotateParams(ctypes.Structure):
    """What ``tr_rotate_and_cache`` reads and writes."""

    _fields_ = [
        ("cache", KVCache),
        *((name, c_void_p) for name in ("qkv", "positions", "cos_sin", "slots", "q")),
        *((name, c_int64) for name in ("num_tokens", "num_heads", "rotary_dim")),
    ]


class AttentionParams(ctypes.Structure):
    """What ``tr_paged_attention`` reads and writes."""

    _fields_ = [
        ("cache", KVCache),
        *(
            (name, c_void_p)
            for name in ("q", "q_sink", "block_tables", "query_start", "seq_lens", "sink_logits", "out")
        ),
        *((name, c_int64) for name in ("num_requests", "max_blocks", "num_heads", "window", "num_sinks")),
        *((name, c_float) for name in ("scale", "softcap")),
    ]


class Matrix(ctypes.Structure):
    """A linear layer's weights; ``bits``: 4, 8, 16 (bf16) or 32. ``weight_only``: 8 bits, activations as they are."""

    _fields_ = [
        *((name, c_void_p) for name in ("panels", "scales", "minima", "bias")),
        *((name, c_int64) for name in ("in_features", "out_features", "bits", "weight_only")),
    ]


class Norm(ctypes.Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]


class Layer(ctypes.Structure):
    """One decoder layer; ``rotation`` is an index of ``enum Rotation``."""

    _fields_ = [
        *((name, Norm) for name in ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")),
        *((name, Norm) for name in ("q_norm", "k_norm")),
        ("matrices", Matrix * 4),  # by ``enum MatrixOfLayer``
        ("cache", KVCache),
        ("sink_logits", c_void_p),
        *((name, c_int64) for name in ("window", "num_sinks", "rotation")),
        ("scale", c_float),
    ]


class Update(ctypes.Structure):
    """What an adapter adds to one matrix's output; all zeros: nothing."""

    _fields_ = [("a", Matrix), ("b", Matrix), ("first", c_int64)]


class AdaptedRows(ctypes.Structure):
    """Rows of a step, one behind the other, that use the same adapter."""

    _fields_ = [("updates", ctypes.POINTER(Update)), ("start", c_int64), ("count", c_int64)]


class Network(ctypes.Structure):
    """What ``tr_forward`` reads in every step."""

    _fields_ = [
        ("layers", ctypes.POINTER(Layer)),
        ("final_norm", Norm),
        ("local_cos_sin", c_void_p),
        *((name, c_int64) for name in ("num_layers", "hidden_size", "num_heads", "activation", "gated")),
        *((name, c_int64) for name in ("centered_norms", "parallel", "q_norm_width", "k_norm_width", "rotary_dim")),
        *((name, c_float) for name in ("eps", "softcap", "residual_scale")),
    ]


class Forward(ctypes.Structure):
    """What ``tr_forward`` reads and writes."""

    _fields_ = [
        ("network", Network),
        *((name, c_void_p) for name in ("x", "residual", "normed", "wide", "narrow", "q", "q_sink", "scratch")),
        *((name, c_void_p) for name in ("cos_sin", "positions", "sink_positions", "slots", "nowhere")),
        *((name, c_void_p) for name in ("block_tables", "query_start", "seq_lens", "num_results")),
        ("adapted", ctypes.POINTER(AdaptedRows)),
        *((name, c_void_p) for name in ("low", "added")),
        *((name, c_int64) for name in ("num_tokens", "num_requests", "max_blocks", "num_adapted")),
    ]


def address(x: Tensor | None, dtype: torch.dtype) -> int | None:
    """Of a tensor that the caller owes us dense and of this dtype; None for one that is left out."""
    if x is None:
        return None
    if x.dtype is not dtype or not x.is_contiguous():
        raise TypeError(f"expected a contiguous {dtype} tensor, got {x.dtype} with strides {x.stride()}")
    return x.data_ptr()


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


LIBRARY, REASON = _load()


def _function(name: str, *argtypes: Any) -> Callable[..., None]:
    """A C function looked up once; a stub that no one calls where there is no library."""
    if LIBRARY is None:
        return lambda *_: None
    function = getattr(LIBRARY, name)
    function.argtypes = argtypes
    function.restype = None
    return function  # type: ignore[no-any-return]


_norm_arguments = (*(c_void_p,) * 5, c_int64, c_int64, c_float, c_int64)
linear = _function("tr_linear", *(c_void_p,) * 5, *(c_int64,) * 4)
quantized_linear = _function("tr_quantized_linear", ctypes.POINTER(QuantizedLinear))
quantized_rows = _function("tr_quantized_rows", ctypes.POINTER(QuantizedRows))
rms_norm = _function("tr_rms_norm", *_norm_arguments)
layer_norm = _function("tr_layer_norm", *_norm_arguments)
head_norm = _function("tr_head_norm", ctypes.POINTER(HeadNormParams))
rotate_and_cache = _function("tr_rotate_and_cache", ctypes.POINTER(RotateParams))
paged_attention = _function("tr_paged_attention", ctypes.POINTER(AttentionParams))
forward = _function("tr_forward", ctypes.POINTER(Forward))
argmax = _function("tr_argmax", *(c_void_p,) * 2, *(c_int64,) * 2)
activation = _function("tr_activation", *(c_void_p,) * 2, *(c_int64,) * 4)
if LIBRARY is not None:
    LIBRARY.tr_set_num_threads.argtypes = (c_int,)
