"""The operations of a decoder layer: one interface each, one implementation per device.

T = tokens in the step, H = query heads, KV = key/value heads, D = head size, B = requests, M = blocks of the longest.
Activations are fp32 on the CPU (weights bf16 or fp32, the cache fp32, or int16 or int8 with a scale for every key and
value of a head) and of the model's dtype on CUDA.

| operation           | from                                                        | to                          |
|---------------------|-------------------------------------------------------------|-----------------------------|
| linear              | x[T, K], W[N, K] or panels[ceil(N/16), K, 16], bias[N]      | [T, N]                      |
| quantized_linear    | x[T, K], panels, scales and minima[ceil(N/16), K/32, 16]    | [T, N]                      |
| quantized_rows      | the same panels, scales and minima, ids[T]                  | rows of W [T, K]            |
| rms_norm            | x[T, C], weight[C]                                          | [T, C]                      |
| add_rms_norm        | the same and residual[T, C]                                 | residual += x, its norm     |
| layer_norm          | x[T, C], weight[C], bias[C]                                 | [T, C]                      |
| add_layer_norm      | the same and residual[T, C]                                 | residual += x, its norm     |
| head_norm           | qkv[T, (H + 2 KV) D], weights of q and of k                 | q and k in place            |
| rotate_and_cache    | qkv[T, (H + 2 KV) D], positions[T], slots[T]                | q[T, H, D]; K, V to cache   |
| paged_attention     | q[T, H, D], cache, block_tables[B, M]                       | [T, H D]                    |
| activation          | x[T, I]                                                     | act(x)                      |
| gated_activation    | x[T, 2 I]                                                   | act(x[:, :I]) * x[:, I:]    |
| argmax              | x[T, V]                                                     | ids[T]                      |

Implementations are registered with torch's dispatcher, so the network names no device: CPU is ``native`` (``reference``
where that was not built), CUDA is ``cuda``, MPS is ``reference``, and fake tensors get shapes alone. On the CPU every
row is computed in one fixed order, whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tokenrelay.model.transformer.kernels import native, reference

_library: Any = torch.library.Library("tokenrelay", "DEF")  # type: ignore[no-untyped-call]
_names: list[str] = []
_layouts: dict[str, ModuleType] = {}


def _define(name: str, schema: str, fake: Callable[..., Tensor | None]) -> Callable[..., Any]:
    """Declare one operation and what it does to shapes; returns its entry point."""
    _library.define(name + schema)
    torch.library.register_fake(f"tokenrelay::{name}", fake, lib=_library)
    _names.append(name)
    entry: Callable[..., Any] = getattr(torch.ops.tokenrelay, name).default
    return entry


def register(device_type: str, implementation: ModuleType) -> None:
    """Run every operation on such devices as ``implementation`` does it, or as the reference where it does not."""
    for name in _names:
        _library.impl(name, getattr(implementation, name, None) or getattr(reference, name), device_type.upper())
    _layouts[device_type] = implementation if hasattr(implementation, "kv_cache_shapes") else reference


def _like_first(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


_linear = _define(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias, int out_features, Tensor? scales=None) -> Tensor",
    lambda x, weight, bias, out_features, scales=None: x.new_empty((x.shape[0], out_features)),
)
_quantized_linear = _define(
    "quantized_linear",
    "(Tensor x, Tensor panels, Tensor scales, Tensor? minima, Tensor? bias, int out_features) -> Tensor",
    lambda x, panels, scales, minima, bias, out_features: x.new_empty((x.shape[0], out_features)),
)
_quantized_rows = _define(
    "quantized_rows",
    "(Tensor panels, Tensor scales, Tensor? minima, Tensor ids, int in_features) -> Tensor",
    lambda panels, scales, minima, ids, in_features: scales.new_empty((len(ids), in_features), dtype=torch.float32),
)
_rms_norm = _define("rms_norm", "(Tensor x, Tensor weight, float eps) -> Tensor", _like_first)
_add_rms_norm = _define(
    "add_rms_norm", "(Tensor x, Tensor(a!) residual, Tensor weight, float eps) -> Tensor", _like_first
)
_layer_norm = _define("layer_norm", "(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor", _like_first)
_add_layer_norm = _define(
    "add_layer_norm",
    "(Tensor x, Tensor(a!) residual, Tensor weight, Tensor? bias, float eps) -> Tensor",
    _like_first,
)
_head_norm = _define(
    "head_norm",
    "(Tensor(a!) qkv, Tensor q_weight, Tensor k_weight, int num_heads, int num_kv_heads, float eps) -> ()",
    lambda *_: None,
)
_rotate_and_cache = _define(
    "rotate_and_cache",
    "(Tensor qkv, Tensor positions, Tensor? cos_sin, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping,"
    " int num_heads, int num_kv_heads, Tensor(c!)? key_scales=None, Tensor(d!)? value_scales=None) -> Tensor",
    lambda qkv, positions, cos_sin, k_cache, v_cache, slot_mapping, num_heads, num_kv_heads, *_: qkv.new_empty(
        (qkv.shape[0], num_heads, qkv.shape[1] // (num_heads + 2 * num_kv_heads))
    ),
)
_paged_attention = _define(
    "paged_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor query_start_loc, Tensor seq_lens,"
    " float scale, int window=0, int num_sinks=0, Tensor? q_sink=None, Tensor? key_scales=None,"
    " Tensor? value_scales=None, float softcap=0.0, Tensor? sink_logits=None) -> Tensor",
    lambda q, *_: q.new_empty((q.shape[0], q.shape[1] * q.shape[2])),
)
_activation = _define("activation", "(Tensor x, str kind) -> Tensor", _like_first)
_gated_activation = _define(
    "gated_activation", "(Tensor x, str kind) -> Tensor", lambda x, kind: x.new_empty((x.shape[0], x.shape[1] // 2))
)
_argmax = _define("argmax", "(Tensor x) -> Tensor", lambda x: x.new_empty(x.shape[0], dtype=torch.int64))


def kv_cache_shapes(
    device: torch.device, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of one layer's K and V cache; create them zeroed. ``block_size`` is one that ``block_size`` gave."""
    shapes: tuple[tuple[int, ...], tuple[int, ...]] = _layouts[device.type].kv_cache_shapes(
        num_blocks, block_size, num_kv_heads, head_dim, dtype
    )
    return shapes


def block_size(device: torch.device, wanted: int) -> int:
    """The least number of tokens per block that the device's attention reads, from ``wanted`` on."""
    unit: int = _layouts[device.type].BLOCK_SIZE
    return -(-wanted // unit) * unit


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, scales: Tensor | None = None) -> Tensor:
    """x [T, K], weight [N, K] or panels [ceil(N / 16), K, 16], bias [N] -> [T, N].

    A weight of int8 has fp16 scales, [N, K / 32] or panels [ceil(N / 16), K / 32, 16]; x is multiplied as it is.
    """
    return _linear(x, weight, bias, out_features, scales)  # type: ignore[no-any-return]


def quantized_linear(
    x: Tensor, panels: Tensor, scales: Tensor, minima: Tensor | None, bias: Tensor | None, out_features: int
) -> Tensor:
    """x [T, K] @ W^T + bias [N] -> [T, N], with W of 8 or 4 bits and x rounded to 8, both in groups of 32 along K.

    What sticks out of a row of x takes more than 8 bits. (as the columns of Dettmers et al., "LLM.int8()")
    panels: uint8, 8 bits [ceil(N / 16), K / 4, 16, 4], or 4 bits [ceil(N / 16), K / 8, 16, 4], which have minima.
    scales, minima [ceil(N / 16), K / 32, 16] fp16. Sums within a group are exact, whatever computes them.
    """
    return _quantized_linear(x, panels, scales, minima, bias, out_features)  # type: ignore[no-any-return]


def quantized_rows(panels: Tensor, scales: Tensor, minima: Tensor | None, ids: Tensor, in_features: int) -> Tensor:
    """Rows of such a W by their numbers, ids [T] int64, each below N -> [T, K] fp32."""
    return _quantized_rows(panels, scales, minima, ids, in_features)  # type: ignore[no-any-return]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, C], weight [C] -> x / sqrt(mean(x^2) + eps) * weight."""
    return _rms_norm(x, weight, eps)  # type: ignore[no-any-return]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual [T, C] += x [T, C], in place; returns the norm of the sum."""
    return _add_rms_norm(x, residual, weight, eps)  # type: ignore[no-any-return]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """x [T, C], weight [C], bias [C] -> (x - mean) / sqrt(variance + eps) * weight + bias."""
    return _layer_norm(x, weight, bias, eps)  # type: ignore[no-any-return]


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """residual [T, C] += x [T, C], in place; returns the norm of the sum."""
    return _add_layer_norm(x, residual, weight, bias, eps)  # type: ignore[no-any-return]


def head_norm(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, num_heads: int, num_kv_heads: int, eps: float) -> None:
    """RMS norm of q and k inside qkv [T, (H + 2 KV) D], in place.

    Of each head by itself, if a weight has D elements; of all heads at once, if it has H D (q) or KV D (k).
    """
    _head_norm(qkv, q_weight, k_weight, num_heads, num_kv_heads, eps)


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
    """Rotate Q and K to their positions, write K and V to the cache; a negative slot is not written.

    qkv [T, (H + 2 KV) D], positions [T] int64, cos_sin [max position, R] fp32 (cosines then sines of the first R <= D
    elements of a head, of which i turns with i + R/2; None: no rotation), slot_mapping [T] int64 (block * block_size +
    offset) -> q [T, H, D]. With scales [blocks, KV, block_size] fp32 the cache is of integers: scale = max |x| /
    largest of a key or value of one head, elements round(x * (largest / max |x|)), ties to even; largest is 127 in
    int8, 8191 in int16.
    """
    return _rotate_and_cache(  # type: ignore[no-any-return]
        qkv, positions, cos_sin, k_cache, v_cache, slot_mapping, num_heads, num_kv_heads, key_scales, value_scales
    )


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
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Causal attention over the paged cache; the last query of a request is at position ``seq_lens`` - 1.

    q [T, H, D], block_tables [B, M], query_start_loc [B + 1], seq_lens [B] (with this step's tokens), all int32
    -> [T, H D].

    A query at position p sees the keys 0 … p. With a window it sees the last ``window`` of them, its own included, and
    before them the first ``num_sinks`` (all keys, while p < num_sinks + window). The sinks that the window has left
    behind are scored with ``q_sink`` [T, H, D] instead of q, if it is given. Blocks that no query of a request sees are
    not read: they may be another's by now.

    With a softcap a scaled score s becomes softcap * tanh(s / softcap). (Gemma 2) ``sink_logits`` [H] fp32 take part in
    the softmax beside the scores and have no value. (GPT-OSS; Xiao et al. 2023, section 3.3)

    Over a cache of integers both products are of integers: scaled queries, and weights times the values' scales in
    chunks of 64 keys, have as many bits as keep their sums within 32, and a scale each. (as Zhang et al. 2024,
    "SageAttention", in 8 bits)
    """
    return _paged_attention(  # type: ignore[no-any-return]
        q,
        k_cache,
        v_cache,
        block_tables,
        query_start_loc,
        seq_lens,
        scale,
        window,
        num_sinks,
        q_sink,
        key_scales,
        value_scales,
        softcap,
        sink_logits,
    )


def activation(x: Tensor, kind: str) -> Tensor:
    """x [T, I] -> act(x); kind: silu, gelu, gelu_tanh, relu or relu2 (its square)."""
    return _activation(x, kind)  # type: ignore[no-any-return]


def gated_activation(x: Tensor, kind: str) -> Tensor:
    """x [T, 2 I] -> act(x[:, :I]) * x[:, I:].

    Here kind may also be swiglu_oai (GPT-OSS): g sigmoid(1.702 g) (u + 1), with gate g <= 7 and -7 <= up u <= 7.
    """
    return _gated_activation(x, kind)  # type: ignore[no-any-return]


def argmax(x: Tensor) -> Tensor:
    """x [T, V] fp32 -> where each row's largest element first stands, [T] int64."""
    return _argmax(x)  # type: ignore[no-any-return]


register("cpu", native if native.is_available() else reference)
if torch.backends.mps.is_available():
    register("mps", reference)
if torch.cuda.is_available():  # only then: varlen_attn brings torch's compiler along, two seconds of start-up
    from tokenrelay.model.transformer.kernels import cuda

    register("cuda", cuda)
