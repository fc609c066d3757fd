"""Tensors of a transformers folder: config.json beside one or more memory-mapped safetensors files. Never pickle."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families import FAMILIES
from tokenrelay.model.quantized import Quantized
from tokenrelay.model.weights.config_check import size_fault
from tokenrelay.model.weights.config_reader import config_from_folder, read_json
from tokenrelay.model.weights.errors import CheckpointError
from tokenrelay.model.weights.quantized_safetensors import assembled, read_method

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsCheckpoint:
    """A folder with config.json and model.safetensors, or shards named by model.safetensors.index.json.

    Raises:
        CheckpointError: a file is missing or damaged, or the index names what no shard holds.
        UnsupportedModelError: a network this server cannot run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config = config_from_folder(folder)
        self._shards = self._read_index()
        self._method = read_method(read_json(folder / "config.json").get("quantization_config"))
        self.rules = FAMILIES[self._config.architecture].rules
        size = sum(shard.stat().st_size for shard in self._shards)
        if fault := size_fault(self._config, sum(1 for _ in self._names()), size):
            raise CheckpointError(f"{folder / 'config.json'}: {fault}")

    def config(self) -> ModelConfig:
        return self._config

    def stored(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, torch.Tensor | Quantized]]:
        """As ``tensors``, but matrices of few bits come so if our kernels can multiply them."""
        for name, tensor in self._whole(keep=True):
            yield name, tensor if isinstance(tensor, Quantized) else tensor.to(dtype)

    def tensors(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor once, shard by shard; matrices of few bits dequantized."""
        for name, tensor in self._whole(keep=False):
            assert isinstance(tensor, torch.Tensor)
            yield name, tensor.to(dtype)

    def _whole(self, *, keep: bool) -> Iterator[tuple[str, torch.Tensor | Quantized]]:
        if self._method is None:
            return self._files()
        return assembled(self._files(), self._names(), self._method, keep=keep)

    def _files(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What the files hold, as they hold it."""
        for shard, names in self._shards.items():
            try:
                with safe_open(shard, framework="pt") as file:
                    for name in names if names is not None else file.keys():
                        yield name, file.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{shard}: {error}") from error

    def _names(self) -> Iterator[str]:
        for shard, names in self._shards.items():
            try:
                with safe_open(shard, framework="pt") as file:
                    yield from names if names is not None else file.keys()
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{shard}: {error}") from error

    def _read_index(self) -> dict[Path, list[str] | None]:
        """Shards and the names to take from each; None means all."""
        index = self._folder / _INDEX
        if not index.is_file():
            return {self._existing(_SINGLE): None}
        shards: dict[Path, list[str] | None] = {}
        for shard, names in _by_shard(index).items():
            shards[self._existing(shard)] = names
        return shards

    def _existing(self, shard: str) -> Path:
        if shard not in os.listdir(self._folder):
            raise CheckpointError(f"{self._folder}: has no file {shard[:64]!r}; fetch the whole model again")
        return self._folder / shard


def _by_shard(index: Path) -> dict[str, list[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map from tensor names to file names")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        shards.setdefault(shard, []).append(name)
    return shards
