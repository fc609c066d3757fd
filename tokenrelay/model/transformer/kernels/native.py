"""The CPU operations through the native library (``library``).

Promises batch invariance: an output row has the same bits whatever else is in the call, on any number of threads and
any instruction set. Activations are fp32; weights bf16 or fp32, the cache one of these or int8. What the kernels do not
cover (other dtypes, heads above 256) goes to the torch reference, which does not promise that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokenrelay.model.quantized import GROUP
from tokenrelay.model.transformer.kernels import library, reference

ISA_NAMES = ("portable", "avx2", "avx512")
ACTIVATION_KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
MAX_HEAD_DIM = 256
KEYS_PER_VECTOR = 16
STORED = (torch.bfloat16, torch.float32)
CACHE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


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
        address(scales, torch.float16),
        address(bias, torch.float32),
        out.data_ptr(),
        rows,
        in_features,
        out_features,
        8 * weight.itemsize,
    )
    return out


def scratch_size(in_features: int) -> int:
    """Bytes per row: two halves of each integer; of each group a scale, two sums and a mark."""
    return 2 * in_features + 13 * in_features // GROUP


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
            address(panels, torch.uint8),
            address(scales, torch.float16),
            address(minima, torch.float16),
            address(bias, torch.float32),
            out.data_ptr(),
            scratch.data_ptr(),
            rows,
            in_features,
            out_features,
            8 if minima is None else 4,
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


def address(x: Tensor | None, dtype: torch.dtype) -> int | None:
    """Of a tensor that the caller owes us dense and of this dtype; None for one that is left out."""
    if x is None:
        return None
    if x.dtype is not dtype or not x.is_contiguous():
        raise TypeError(f"expected a contiguous {dtype} tensor, got {x.dtype} with strides {x.stride()}")
    return x.data_ptr()


def describe_cache(
    k_cache: Tensor, v_cache: Tensor, key_scales: Tensor | None = None, value_scales: Tensor | None = None
) -> library.KVCache | None:
    """The cache as the kernels see it; None if they do not cover it."""
    _, num_kv_heads, head_dim, block_size = k_cache.shape
    dtype = k_cache.dtype
    covered = head_dim <= MAX_HEAD_DIM and block_size % KEYS_PER_VECTOR == 0 and dtype in CACHE_TYPES
    if not covered:
        return None
    return library.KVCache(
        _address_of_blocks(k_cache, dtype),
        _address_of_blocks(v_cache, dtype),
        address(key_scales, torch.float32),
        address(value_scales, torch.float32),
        k_cache.stride(0),
        v_cache.stride(0),
        num_kv_heads,
        head_dim,
        block_size,
        CACHE_TYPES[dtype],
    )


def _address_of_blocks(cache: Tensor, dtype: torch.dtype) -> int:
    """Each block must be dense; something else may lie between them."""
    address(cache[0], dtype)
    return cache.data_ptr()


def rotate_and_cache(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    num_kv_heads: int,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    qkv = qkv.contiguous()
    cache = describe_cache(k_cache, v_cache, key_scales, value_scales)
    if cache is None or qkv.dtype is not torch.float32:
        return reference.rotate_and_cache(
            qkv, positions, cos_sin, k_cache, v_cache, slot_mapping, num_heads, num_kv_heads, key_scales, value_scales
        )
    q = qkv.new_empty((qkv.shape[0], num_heads, cache.head_dim))
    library.rotate_and_cache(
        library.RotateParams(
            cache,
            qkv.data_ptr(),
            address(positions, torch.int64),
            address(cos_sin, torch.float32),
            address(slot_mapping, torch.int64),
            q.data_ptr(),
            qkv.shape[0],
            num_heads,
        )
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
    window: int = 0,
    num_sinks: int = 0,
    q_sink: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    q = q.contiguous()
    cache = describe_cache(k_cache, v_cache, key_scales, value_scales)
    if cache is None or q.dtype is not torch.float32:
        return reference.paged_attention(
            *(q, k_cache, v_cache, block_tables, query_start_loc, seq_lens, scale),
            *(window, num_sinks, q_sink, key_scales, value_scales),
        )
    rows, num_heads, head_dim = q.shape
    out = q.new_empty((rows, num_heads * head_dim))
    library.paged_attention(
        library.AttentionParams(
            cache,
            q.data_ptr(),
            address(q_sink, torch.float32),
            address(block_tables, torch.int32),
            address(query_start_loc, torch.int32),
            address(seq_lens, torch.int32),
            out.data_ptr(),
            *block_tables.shape,
            num_heads,
            window,
            num_sinks,
            scale,
        )
    )
    return out


def activation(x: Tensor, kind: str) -> Tensor:
    x = x.contiguous()
    if x.dtype is not torch.float32:
        return reference.activation(x, kind)
    out = torch.empty_like(x)
    library.activation(x.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], ACTIVATION_KINDS[kind], False)
    return out


def gated_activation(x: Tensor, kind: str) -> Tensor:
    x = x.contiguous()
    if x.dtype is not torch.float32:
        return reference.gated_activation(x, kind)
    rows, columns = x.shape[0], x.shape[1] // 2
    out = x.new_empty((rows, columns))
    library.activation(x.data_ptr(), out.data_ptr(), rows, columns, ACTIVATION_KINDS[kind], True)
    return out
