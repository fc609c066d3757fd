"""All layers of a step in one native call: what ``Transformer.run_layers`` does with hundreds, to the same bits."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.transformer.attention import AttentionMetadata
from tokenrelay.model.transformer.decoder_layer import DecoderLayer
from tokenrelay.model.transformer.kernels import library, native, native_attention
from tokenrelay.model.transformer.kernels.packed_linear import PackedLinear, QuantizedLinear
from tokenrelay.model.transformer.kv_cache import LayerCache
from tokenrelay.model.transformer.layers import MLP
from tokenrelay.model.transformer.lora import ADAPTED, Adapter, Update
from tokenrelay.model.transformer.transformer import Transformer

OBEYED = {  # here or in forward.inl; any other switch that is set takes the layers one by one
    *("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"),
    *("norm", "norm_eps", "norm_bias", "norm_placement", "parallel_residual", "shared_norm", "final_norm"),
    *("activation", "gated_mlp", "mlp_bias", "residual_scale"),
    *("attention_bias", "output_bias", "qk_norm", "attention_scale", "attention_softcap", "learned_sinks"),
    *("sliding_window", "full_attention_layers", "rotary_dim", "local_rope_theta", "unrotated_layers"),
}
OUTSIDE = {  # of the layers
    *("architecture", "vocab_size", "max_position_embeddings", "eos_token_ids", "tie_word_embeddings"),
    *("positions", "rope_theta", "rope_scaling", "embedding_scale", "logits_scale", "logits_softcap", "lm_head_bias"),
}
UNROTATED, ROTATED, ROTATED_LOCALLY = range(3)


def replace_layers(model: Transformer) -> None:
    """Let ``model`` run its layers natively, if it may; its linears must be packed already."""
    if covers(model.config) and all(_is_packed(layer) for layer in model.layers):
        model.run_layers = NativeLayers(model)  # type: ignore[method-assign]


def covers(config: ModelConfig) -> bool:
    """Whether every switch that is set is known here; else the layers run one by one."""
    others = [field for field in fields(config) if field.name not in OBEYED | OUTSIDE]
    return (
        all(getattr(config, field.name) == field.default for field in others)
        and config.norm_placement != "after_sum"
        and config.head_dim <= native_attention.MAX_HEAD_DIM
    )


def _is_packed(layer: nn.Module) -> bool:
    """Whether the matrices are what they seem to be: no adapter, nothing of another rank."""
    return all(type(linear) in (PackedLinear, QuantizedLinear) for linear in _linears(layer))


def _linears(layer: nn.Module) -> tuple[nn.Module, ...]:
    assert isinstance(layer, DecoderLayer)
    assert isinstance(layer.mlp, MLP)
    return layer.attention.qkv_proj, layer.attention.o_proj, layer.mlp.up_proj, layer.mlp.down_proj


class Room(NamedTuple):
    """What a step of so many rows works in; the next one of as many works in the same."""

    residual: Tensor
    normed: Tensor
    wide: Tensor
    narrow: Tensor
    q: Tensor
    scratch: Tensor


class NativeLayers:
    """Called as ``Transformer.run_layers``; what it returns is overwritten by the next call. Rows that nobody asked for
    (``AttentionMetadata.num_results``) leave the last layer once their keys and values are cached.

    Keeps the addresses of the weights, and of the cache it last met.
    """

    def __init__(self, model: Transformer) -> None:
        self._model = model  # alive as long as its addresses are in use
        self._layers = (library.Layer * len(model.layers))(*(_layer(model, i) for i in range(len(model.layers))))
        self._network = _network(model, self._layers)
        self._cache: Sequence[LayerCache] = ()
        self._is_covered = False
        linears = [module for module in model.layers.modules() if isinstance(module, PackedLinear | QuantizedLinear)]
        widths = [linear.in_features for linear in linears if isinstance(linear, QuantizedLinear)]
        self._scratch = native.scratch_size(max(widths, default=0))  # bytes per token
        self._wide = max(linear.out_features for linear in linears)
        self._narrow = max(linear.in_features for linear in linears)
        self._room = self._make_room(0)
        self.adapt([])

    def adapt(self, rows: Sequence[tuple[NativeAdapter, range]]) -> None:
        """Which rows of the steps from now on use which adapter."""
        self._adapters = [adapter for adapter, _ in rows]
        spans = ((adapter.updates, own.start, len(own)) for adapter, own in rows)
        self._adapted = (library.AdaptedRows * len(rows))(*(library.AdaptedRows(*span) for span in spans))

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
        config, rows = self._model.config, x.shape[0]
        if rows != self._room.normed.shape[0]:
            self._room = self._make_room(rows)
        residual, normed, wide, narrow, q, scratch = self._room
        low = added = None
        if self._adapters:
            low = x.new_empty((rows, max(adapter.rank for adapter in self._adapters)))
            added = x.new_empty((rows, self._wide))
        sinks = metadata.sink_positions
        nowhere = None if sinks is None else torch.full_like(metadata.slot_mapping, -1)
        indices = positions, sinks, metadata.slot_mapping, nowhere
        tables = metadata.block_tables, metadata.query_start_loc, metadata.seq_lens, self._asked_for(metadata, rows)
        library.forward(
            library.Forward(
                self._network,
                *(library.address(tensor, torch.float32) for tensor in (x, residual, normed, wide, narrow, q[0])),
                None if sinks is None else q[1].data_ptr(),
                scratch.data_ptr(),
                library.address(rotary, torch.float32),
                *(library.address(tensor, torch.int64) for tensor in indices),
                *(library.address(tensor, torch.int32) for tensor in tables),
                self._adapted,
                library.address(low, torch.float32),
                library.address(added, torch.float32),
                rows,
                *metadata.block_tables.shape,
                len(self._adapted),
            )
        )
        return normed if config.final_norm else residual

    def _asked_for(self, metadata: AttentionMetadata, rows: int) -> Tensor | None:
        """None: all rows. So it is with adapters, whose rows stay where they are, and in a decode step."""
        results = metadata.num_results
        if results is None or self._adapters or results.shape[0] == rows or int(results.sum()) == rows:
            return None
        return results

    def _make_room(self, rows: int) -> Room:
        config = self._model.config
        return Room(
            residual=torch.empty(rows, config.hidden_size),
            normed=torch.empty(rows, config.hidden_size),
            wide=torch.empty(rows, self._wide),
            narrow=torch.empty(rows, self._narrow),
            q=torch.empty(2, rows, config.q_size),
            scratch=torch.empty(rows * self._scratch, dtype=torch.uint8),
        )

    def _bind(self, kv_cache: Sequence[LayerCache]) -> None:
        described = [native_attention.describe_cache(self._model.config.head_dim, *cache) for cache in kv_cache]
        self._is_covered = all(described)
        for layer, cache in zip(self._layers, described, strict=True):
            layer.cache = cache or library.KVCache()
        self._cache = kv_cache


class NativeAdapter:
    """An adapter's updates as the native call reads them."""

    def __init__(self, adapter: Adapter, num_layers: int) -> None:
        self._adapter = adapter  # alive as long as its addresses are in use
        names = [f"layers.{layer}.{name}" for layer in range(num_layers) for name in ADAPTED]
        self.updates = (library.Update * len(names))(*(_update(adapter.get(name)) for name in names))
        self.rank = max(update.a.out_features for update in self.updates)


def _update(update: Update | None) -> library.Update:
    return library.Update(_matrix(update.a), _matrix(update.b), update.first) if update else library.Update()


def _network(model: Transformer, layers: ctypes.Array[library.Layer]) -> library.Network:
    config = model.config
    widths = {"": (0, 0), "head": (config.head_dim, config.head_dim), "whole": (config.q_size, config.kv_size)}
    q_norm_width, k_norm_width = widths[config.qk_norm]
    return library.Network(
        layers=layers,
        final_norm=_norm(model.norm),
        local_cos_sin=library.address(model.local_rotary, torch.float32),
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        activation=native.ACTIVATION_KINDS[config.activation],
        gated=config.gated_mlp,
        centered_norms=config.norm != "rms",
        parallel=config.parallel_residual,
        q_norm_width=q_norm_width,
        k_norm_width=k_norm_width,
        rotary_dim=config.rotary_dim or config.head_dim,
        eps=config.norm_eps,
        softcap=config.attention_softcap,
        residual_scale=config.residual_scale,
    )


def _layer(model: Transformer, index: int) -> library.Layer:
    module = model.layers[index]
    assert isinstance(module, DecoderLayer)
    attention = module.attention
    return library.Layer(
        *map(_norm, _norms(module, model.config)),
        *map(_norm, (attention.q_norm, attention.k_norm)),
        (library.Matrix * 4)(*map(_matrix, _linears(module))),
        library.KVCache(),
        library.address(attention.sinks, torch.float32),
        attention.window,
        attention.num_sinks,
        _rotation(model, index),
        attention.scale,
    )


def _norms(layer: DecoderLayer, config: ModelConfig) -> list[nn.Module | None]:
    """Before and after attention, before and after the MLP."""
    names = ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")
    norms = [getattr(layer, name, None) for name in names]
    return [None, norms[0], None, norms[2]] if config.norm_placement == "post" else norms


def _rotation(model: Transformer, index: int) -> int:
    """Which table the layer takes, whatever the step's is."""
    of_step = torch.empty(0)
    table = model.rotary_of(index, of_step)
    return UNROTATED if table is None else ROTATED if table is of_step else ROTATED_LOCALLY


def _norm(module: nn.Module | None) -> library.Norm:
    return library.Norm(*(library.address(getattr(module, name, None), torch.float32) for name in ("weight", "bias")))


def _matrix(linear: nn.Module) -> library.Matrix:
    assert isinstance(linear, PackedLinear | QuantizedLinear)
    bias = library.address(linear.bias, torch.float32)
    sizes = linear.in_features, linear.out_features
    if isinstance(linear, PackedLinear):
        scales = library.address(linear.scales, torch.float16)
        bits = 8 * linear.weight.itemsize
        return library.Matrix(linear.weight.data_ptr(), scales, None, bias, *sizes, bits, scales is not None)
    minima = library.address(linear.minima, torch.float16)
    return library.Matrix(linear.panels.data_ptr(), linear.scales.data_ptr(), minima, bias, *sizes, linear.bits, False)
