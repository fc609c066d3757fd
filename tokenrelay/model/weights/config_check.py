"""Whether a description can be that of a network: kinds of values, and sizes that fit together. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from tokenrelay.model.config import Experts, ModelConfig

MAX_LAYERS = 10_000
_WEIGHTS_PER_BYTE = 8  # no format stores more; the densest of GGUF has 1.56 bits per weight
_LARGEST = 2**31 - 1
_MAY_BE_ZERO = ("rotary_dim", "sliding_window", "shared_intermediate_size")


def config_fault(config: ModelConfig) -> str:
    """What is wrong with it; empty: nothing."""
    fault = _fault_of_fields(config) or (_fault_of_fields(config.experts) if config.experts else "")
    if fault:
        return fault
    if config.num_layers > MAX_LAYERS:
        return f"describes {config.num_layers} layers; {MAX_LAYERS} are possible"
    if config.num_heads % config.num_kv_heads:
        return f"has {config.num_heads} heads, which cannot share {config.num_kv_heads} of keys and values"
    if config.experts and config.experts.num_experts_per_token > config.experts.num_experts:
        return f"has {config.experts.num_experts} experts, of which no token can have more"
    return ""


def size_fault(config: ModelConfig, num_tensors: int, num_bytes: int) -> str:
    """Whether files of this size cannot hold it: said before a network of that size is allocated."""
    if config.num_layers > num_tensors:
        return f"describes {config.num_layers} layers, the files hold {num_tensors} tensors"
    if config.num_weights > _WEIGHTS_PER_BYTE * num_bytes:
        return f"describes a network of {config.num_weights} weights, the files have {num_bytes} bytes"
    return ""


def _fault_of_fields(config: ModelConfig | Experts) -> str:
    for field in fields(config):
        value, smallest = getattr(config, field.name), 0 if field.name in _MAY_BE_ZERO else 1
        kind = _KINDS.get(str(field.type))
        if kind and not kind(value, smallest):
            return f"{field.name} cannot be {str(value)[:64]!r}"
    return ""


def _is_size(value: Any, smallest: int) -> bool:
    return type(value) is int and smallest <= value <= _LARGEST


_KINDS: dict[str, Callable[[Any, int], bool]] = {
    "int": _is_size,
    "float": lambda value, _: type(value) in (int, float) and math.isfinite(value),
    "bool": lambda value, _: type(value) is bool,
    "tuple[int, ...]": lambda value, _: all(_is_size(item, 0) for item in value),
    "frozenset[int]": lambda value, _: all(_is_size(item, 0) for item in value),
}
