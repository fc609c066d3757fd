"""All layers of a step in one native call: what ``Transformer.run_layers`` does with hundreds, to the same bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tokenrelay.model.transformer.attention import AttentionMetadata
from tokenrelay.model.transformer.kernels import library, native
from tokenrelay.model.transformer.kernels.packed_linear import PackedLinear, QuantizedLinear
from tokenrelay.model.transformer.kv_cache import LayerCache
from tokenrelay.model.transformer.transformer import DecoderLayer, Transformer


def replace_layers(model: Transformer) -> None:
    """Let ``model`` run its layers natively; its linears must be packed already."""
    if model.config.head_dim <= native.MAX_HEAD_DIM:
        model.run_layers = NativeLayers(model)  # type: ignore[method-assign]


class NativeLayers:
    """Called as ``Transformer.run_layers``. Keeps the addresses of the weights, and of the cache it last met."""

    def __init__(self, model: Transformer) -> None:
        self._model = model  # alive as long as its addresses are in use
        self._config = config = model.config
        self._layers = (library.Layer * config.num_layers)(*map(_layer, model.layers))
        self._final_norm = _norm(model.norm)
        self._cache: Sequence[LayerCache] = ()
        self._is_covered = False
        linears = [module for module in model.layers.modules() if isinstance(module, PackedLinear | QuantizedLinear)]
        widths = [linear.in_features for linear in linears if isinstance(linear, QuantizedLinear)]
        self._scratch = native.scratch_size(max(widths, default=0))  # bytes per token
        self._wide = max(linear.out_features for linear in linears)
        self._narrow = max(linear.in_features for linear in linears)

    def __call__(
        self,
        x: Tensor,
        positions: Tensor,
        rotary: Tensor | None,
        kv_cache: Sequence[LayerCache],
        metadata: AttentionMetadata,
    ) -> Tensor:
        if kv_cache is not self._cache:
            self._bind(kv_cache)
        if not self._is_covered:
            return Transformer.run_layers(self._model, x, positions, rotary, kv_cache, metadata)
        config, rows = self._config, len(x)
        residual, normed = torch.zeros_like(x), torch.empty_like(x)
        wide, narrow = x.new_empty((rows, self._wide)), x.new_empty((rows, self._narrow))
        q = x.new_empty((2, rows, config.q_size))
        scratch = x.new_empty(rows * self._scratch, dtype=torch.uint8)
        sinks = metadata.sink_positions
        nowhere = None if sinks is None else torch.full_like(metadata.slot_mapping, -1)
        tables = metadata.block_tables, metadata.query_start_loc, metadata.seq_lens
        library.forward(
            library.Forward(
                self._layers,
                self._final_norm,
                *(native.address(tensor, torch.float32) for tensor in (x, residual, normed, wide, narrow, q[0])),
                None if sinks is None else q[1].data_ptr(),
                scratch.data_ptr(),
                native.address(rotary, torch.float32),
                *(native.address(tensor, torch.int64) for tensor in (positions, sinks, metadata.slot_mapping, nowhere)),
                *(native.address(tensor, torch.int32) for tensor in tables),
                config.num_layers,
                rows,
                config.hidden_size,
                config.num_heads,
                *metadata.block_tables.shape,
                native.ACTIVATION_KINDS[config.activation],
                config.gated_mlp,
                config.norm != "rms",
                config.norm_eps,
            )
        )
        return normed

    def _bind(self, kv_cache: Sequence[LayerCache]) -> None:
        described = [native.describe_cache(*cache) for cache in kv_cache]
        self._is_covered = all(described)
        for layer, cache in zip(self._layers, described, strict=True):
            layer.cache = cache or library.KVCache()
        self._cache = kv_cache


def _layer(module: nn.Module) -> library.Layer:
    assert isinstance(module, DecoderLayer)
    attention, mlp = module.attention, module.mlp
    return library.Layer(
        _norm(module.attention_norm),
        _norm(module.mlp_norm),
        *map(_matrix, (attention.qkv_proj, attention.o_proj, mlp.up_proj, mlp.down_proj)),
        library.KVCache(),
        attention.window,
        attention.num_sinks,
        attention.scale,
    )


def _norm(module: nn.Module) -> library.Norm:
    return library.Norm(*(native.address(getattr(module, name, None), torch.float32) for name in ("weight", "bias")))


def _matrix(linear: nn.Module) -> library.Matrix:
    assert isinstance(linear, PackedLinear | QuantizedLinear)
    bias = native.address(linear.bias, torch.float32)
    sizes = linear.in_features, linear.out_features
    if isinstance(linear, PackedLinear):
        scales = native.address(linear.scales, torch.float16)
        bits = 8 * linear.weight.itemsize
        return library.Matrix(linear.weight.data_ptr(), scales, None, bias, *sizes, bits, scales is not None)
    minima = native.address(linear.minima, torch.float16)
    return library.Matrix(linear.panels.data_ptr(), linear.scales.data_ptr(), minima, bias, *sizes, linear.bits, False)
