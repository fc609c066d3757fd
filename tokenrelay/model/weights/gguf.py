"""Tensors of a GGUF file, dequantized one at a time and given back under transformers' names and layout.

llama.cpp stores the rows of q and k in the order of interleaved rope, and GPT-2's Conv1D transposed; both are undone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
import structlog
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families import FAMILIES
from tokenrelay.model.quantized import GROUP, Quantized, quantize
from tokenrelay.model.weights.config_reader import config_from_gguf
from tokenrelay.model.weights.gguf_metadata import GGUFMetadata, TensorInfo, read_gguf_metadata
from tokenrelay.model.weights.gguf_quantized import NOT_QUANTIZED, TAKEN_APART, quantized_from
from tokenrelay.model.weights.gguf_rope import ROPE_TENSORS

# Elements dequantized at once: they fit the cache, a call per row would cost four times as much, and torch does not
# split so few among threads, which on a busy machine wait for each other.
_CHUNK = 1 << 15

_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GPT2_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_NAMES = {"llama": ("model.layers", _LLAMA_NAMES), "gpt2": ("transformer.h", _GPT2_NAMES)}
_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
_GGUF_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")


class GGUFCheckpoint:
    """A GGUF file of architecture llama or gpt2, memory-mapped.

    Raises:
        CheckpointError: the header contradicts itself or claims more than the file holds.
        UnsupportedModelError: a network this server cannot run.
    """

    def __init__(self, path: Path) -> None:
        self._metadata = read_gguf_metadata(path)
        self._config = config_from_gguf(self._metadata)
        self.rules = FAMILIES[self._config.architecture].rules
        self._data: npt.NDArray[np.uint8] = np.memmap(path, mode="r", dtype=np.uint8)
        for info in self._metadata.tensors.values():
            _blocks(info, self._data, self._metadata)

    def config(self) -> ModelConfig:
        return self._config

    def tensors(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor once, in file order; raises CheckpointError naming a tensor that cannot be read."""
        for info, name in self._named():
            yield name, self._converted(info, name, dtype)

    def stored(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, torch.Tensor | Quantized]]:
        """As ``tensors``, but quantized matrices come in 4 or 8 bits: exactly as they are, or as near as can be told.

        GPT-2's are transposed, and so dequantized.
        """
        kinds: Counter[str] = Counter()
        for info, name in self._named():
            kind, blocks = _blocks(info, self._data, self._metadata)
            if kind in NOT_QUANTIZED or len(info.shape) != 2 or self._config.architecture == "gpt2":
                yield name, self._converted(info, name, dtype)
                continue
            exact = kind in TAKEN_APART
            stored = quantized_from(blocks, kind, info.shape) if exact else self._in_8_bits(info)
            kinds[f"{kind.name} in {stored.bits} bits"] += 1
            yield name, stored.mapped(partial(self._hf_layout, info, name))
        if kinds:
            became = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            structlog.get_logger().info("quantized matrices", became=became)

    def _in_8_bits(self, info: TensorInfo) -> Quantized:
        integers = torch.empty(info.shape, dtype=torch.int8)
        scales = torch.empty(info.shape[0], info.shape[1] // GROUP, dtype=torch.float16)
        chunks = torch.split(integers.view(-1), _CHUNK), torch.split(scales.view(-1), _CHUNK // GROUP)
        for values, *chunk in zip(_pieces(info, self._data, self._metadata), *chunks, strict=True):
            rounded = quantize(values.view(1, -1))
            chunk[0].copy_(rounded.integers[0])
            chunk[1].copy_(rounded.scales[0])
        return Quantized(integers, scales)

    def _named(self) -> Iterator[tuple[TensorInfo, str]]:
        for info in self._metadata.tensors.values():
            if info.name not in ROPE_TENSORS:
                yield info, hf_name(info.name, self._metadata)

    def _converted(self, info: TensorInfo, name: str, dtype: torch.dtype) -> torch.Tensor:
        return self._hf_layout(info, name, _dequantized(info, self._data, self._metadata, dtype)).contiguous()

    def _hf_layout(self, info: TensorInfo, name: str, values: torch.Tensor) -> torch.Tensor:
        if self._config.architecture == "gpt2":
            return values.T if name.endswith(_CONV1D) else values
        if ".q_proj." in name:
            return self._unpermuted(info, values, self._config.num_heads)
        if ".k_proj." in name:
            return self._unpermuted(info, values, self._config.num_kv_heads)
        return values

    def _unpermuted(self, info: TensorInfo, rows: torch.Tensor, heads: int) -> torch.Tensor:
        """[heads × (pairs, 2), …] → [heads × (2, pairs), …]: from rope on neighbours to rope on halves."""
        if rows.shape[0] != heads * self._config.head_dim or self._config.head_dim % 2:
            raise self._metadata.error(f"tensor {info.name!r} of shape {info.shape} does not hold {heads} heads")
        return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def hf_name(name: str, metadata: GGUFMetadata) -> str:
    """``blk.3.attn_q.weight`` → ``model.layers.3.self_attn.q_proj.weight``; CheckpointError if the name is unknown."""
    layers, names = _NAMES[metadata.architecture]
    match = _GGUF_NAME.fullmatch(name)
    if match is None or match[2] not in names:
        raise metadata.error(f"tensor {name!r} has no place in a {metadata.architecture} network")
    layer, part, kind = match.groups()
    return f"{names[part]}.{kind}" if layer is None else f"{layers}.{layer}.{names[part]}.{kind}"


def _dequantized(
    info: TensorInfo, data: npt.NDArray[np.uint8], metadata: GGUFMetadata, dtype: torch.dtype
) -> torch.Tensor:
    """The tensor in ``dtype``, filled piece by piece so that no second copy of it is ever in memory."""
    values = torch.empty(info.shape, dtype=dtype)
    for piece, dequantized in zip(torch.split(values.view(-1), _CHUNK), _pieces(info, data, metadata), strict=True):
        piece.copy_(dequantized)
    return values


def _pieces(info: TensorInfo, data: npt.NDArray[np.uint8], metadata: GGUFMetadata) -> Iterator[torch.Tensor]:
    """All elements in order, fp32, so many at a time."""
    kind, blocks = _blocks(info, data, metadata)
    blocks_per_piece = _CHUNK // GGML_QUANT_SIZES[kind][0]
    try:
        for start in range(0, len(blocks), blocks_per_piece):
            chunk = np.array(blocks[start : start + blocks_per_piece])
            yield torch.from_numpy(dequantize(chunk.reshape(1, -1), kind).ravel())
    except NotImplementedError as error:
        raise metadata.error(f"tensor {info.name!r} has type {kind.name}, which cannot be dequantized") from error


def _blocks(
    info: TensorInfo, data: npt.NDArray[np.uint8], metadata: GGUFMetadata
) -> tuple[GGMLQuantizationType, npt.NDArray[np.uint8]]:
    """The tensor's bytes as [blocks, bytes per block], after checking that the file has them."""
    try:
        kind = GGMLQuantizationType(info.ggml_type)
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise metadata.error(f"tensor {info.name!r} has unknown type {info.ggml_type}") from None
    if info.shape[-1] % block_size:
        raise metadata.error(f"tensor {info.name!r}: rows of {info.shape[-1]} do not divide into {kind.name} blocks")
    end = info.offset + prod(info.shape) // block_size * block_bytes
    if end > len(data):
        raise metadata.error(f"tensor {info.name!r} ends at byte {end}, but the file at {len(data)}: truncated")
    return kind, data[info.offset : end].reshape(-1, block_bytes)
