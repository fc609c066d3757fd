"""A PEFT adapter's own description, adapter_config.json: what is built, and refusals by name of what is not. No torch.

The names are PEFT's. What only steered the training is not read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tokenrelay.model.weights.config_reader import read_json
from tokenrelay.model.weights.errors import CheckpointError

CONFIG_FILE = "adapter_config.json"
_READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "layers_to_transform"}
_OF_TRAINING = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode"),
    *("lora_dropout", "fan_in_fan_out", "init_lora_weights", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "layers_pattern", "exclude_modules", "runtime_config", "megatron_config", "megatron_core"),
    *("qalora_group_size", "ensure_weight_tying", "peft_version"),
}
_NEUTRAL = (None, False, "none", "", 0)
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # they train against other base weights than ours


N = TypeVar("N", int, float)


class LoRAError(CheckpointError):
    """An adapter that cannot be used with this network; the message names what and where."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAConfig:
    """What decides an adapter's arithmetic. Patterns are of module names, as in PEFT."""

    rank: int
    alpha: float
    rank_stabilized: bool  # divide by the root of the rank (rsLoRA, Kalajdzievski 2023)
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: tuple[str, ...]  # ends of names; (): whatever there are tensors of
    layers: frozenset[int] | None  # None: all

    def rank_of(self, module: str) -> int:
        return _matching(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        alpha, rank = _matching(self.alpha_pattern, module, self.alpha), self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def expects(self, module: str, layer: int) -> bool:
        """Whether it says that this module is adapted."""
        named = any(module == target or module.endswith(f".{target}") for target in self.target_modules)
        return named and (self.layers is None or layer in self.layers)


def read_lora_config(folder: Path, max_rank: int) -> LoRAConfig:
    """Raises LoRAError for what is missing, malformed or not built."""
    path = folder / CONFIG_FILE
    try:
        fields = read_json(path)
    except (CheckpointError, RecursionError) as error:
        raise LoRAError(str(error)) from error
    _refuse_not_built(path, fields)
    config = LoRAConfig(
        rank=_positive(path, "r", fields.get("r")),
        alpha=_number(path, "lora_alpha", fields.get("lora_alpha")),
        rank_stabilized=bool(fields.get("use_rslora")),
        rank_pattern=_pattern(path, "rank_pattern", fields, _positive),
        alpha_pattern=_pattern(path, "alpha_pattern", fields, _number),
        target_modules=() if fields.get("exclude_modules") else _targets(path, fields.get("target_modules")),
        layers=_layers(path, fields.get("layers_to_transform")),
    )
    largest = max([config.rank, *config.rank_pattern.values()])
    if largest > max_rank:
        raise LoRAError(f"{path}: a rank of {largest} is above max_lora_rank ({max_rank})")
    return config


def _refuse_not_built(path: Path, fields: Mapping[str, Any]) -> None:
    if fields.get("peft_type") != "LORA":
        raise LoRAError(f"{path}: peft_type is {str(fields.get('peft_type'))[:40]!r}; only LORA is built")
    for name in sorted(fields.keys() - _READ - _OF_TRAINING):
        if fields[name] not in _NEUTRAL and fields[name] not in ([], {}):
            raise LoRAError(f"{path}: {name[:60]} is not built; only plain LoRA of linear layers is")
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_THE_BASE):
        raise LoRAError(f"{path}: init_lora_weights {start[:40]!r} changed the base weights; convert it to plain LoRA")


def _targets(path: Path, value: Any) -> tuple[str, ...]:
    """A list of names; a single string is a pattern, which only the tensors can tell the meaning of."""
    if isinstance(value, str) or value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise LoRAError(f"{path}: target_modules is not a list of names")
    return tuple(value)


def _layers(path: Path, value: Any) -> frozenset[int] | None:
    if value is None:
        return None
    layers = value if isinstance(value, list) else [value]
    if not all(type(layer) is int for layer in layers):
        raise LoRAError(f"{path}: layers_to_transform is not a list of layers")
    return frozenset(layers)


def _pattern(path: Path, name: str, fields: Mapping[str, Any], value_of: Any) -> dict[str, Any]:
    pattern = fields.get(name) or {}
    if not isinstance(pattern, dict):
        raise LoRAError(f"{path}: {name} is not an object")
    if not all(re.fullmatch(r"[\w.]+", key) for key in pattern):
        raise LoRAError(f"{path}: {name} has an expression as key; only names of modules are built")
    return {key: value_of(path, name, value) for key, value in pattern.items()}


def _positive(path: Path, name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise LoRAError(f"{path}: {name} is {str(value)[:40]}, not a rank")
    return value


def _number(path: Path, name: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise LoRAError(f"{path}: {name} is {str(value)[:40]}, not a number")
    return float(value)


def _matching(pattern: Mapping[str, N], module: str, default: N) -> N:
    """The value of the first key that is the module's name or its end."""
    return next((value for key, value in pattern.items() if f".{module}".endswith(f".{key}")), default)
