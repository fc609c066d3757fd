"""Rope scaling from the keys of a transformers ``config.json``, in their newer and older spelling. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tokenrelay.model.config import RopeScaling, UnsupportedModelError

Config = Mapping[str, Any]

_KEYS = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
    *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    *("low_freq_factor", "high_freq_factor", "short_factor", "long_factor"),
    "finetuned",  # says how the weights were made, not how to run them
}


def rope_parameters(config: Config, head_dim: int) -> dict[str, Any]:
    """``rope_parameters``, or ``rope_scaling`` as it was called before transformers 5, without nulls; and what the
    formulas take from elsewhere in the file. Raises UnsupportedModelError: a type, key or length that is not known.
    """
    stated = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope = {key: value for key, value in stated.items() if value is not None}
    length = _length(config, "max_position_embeddings", 2048)
    if config.get("original_max_position_embeddings"):  # where Phi-3 has it; it goes first, as in transformers
        rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    rope |= {
        "rope_type": _known_type(rope),
        "rope_theta": _positive(rope.get("rope_theta", config.get("rope_theta", 10_000.0)), "rope_theta"),
        "original_max_position_embeddings": _length(rope, "original_max_position_embeddings", length),
    }
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    rope |= {"partial_rotary_factor": part, "rotary_dim": _rotary_dim(part, head_dim)}
    return rope | {"max_position_embeddings": length, "num_frequencies": rope["rotary_dim"] // 2}


def _rotary_dim(part: Any, head_dim: int) -> int:
    """How many of a head's first elements turn."""
    rotary_dim = int(head_dim * _positive(1 if part is None else part, "partial_rotary_factor"))
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise UnsupportedModelError(f"partial_rotary_factor {part!r} rotates {rotary_dim} elements of {head_dim}")
    return rotary_dim


def by_layer_type(config: Config, *, theta: float, local_theta: float) -> tuple[dict[str, Any], float]:
    """The file with the parameters of the layers that see all, and the theta of those with a window.

    Files before transformers 5 state the former's as ``rope_theta`` and ``rope_scaling``. UnsupportedModelError: the
    positions of layers with a window are scaled.
    """
    stated = config.get("rope_parameters") or {}
    nested = bool({"full_attention", "sliding_attention"} & stated.keys())
    local = (stated.get("sliding_attention") or {}) if nested else {}
    if local.get("rope_type", "default") != "default":
        raise UnsupportedModelError(f"rope_parameters: sliding_attention with {local['rope_type']!r} is not supported")
    full = dict((stated.get("full_attention") or {}) if nested else stated) | dict(config.get("rope_scaling") or {})
    full.setdefault("rope_theta", config.get("rope_theta", theta))
    flat = dict(config) | {"rope_parameters": full, "rope_scaling": None}
    windowed = local.get("rope_theta", config.get("rope_local_base_freq", local_theta))
    return flat, _positive(windowed, "rope_theta of layers with a window")


def _known_type(rope: Config) -> str:
    rope_type = str(rope.get("rope_type", rope.get("type", "default")))
    rope_type = {"su": "longrope"}.get(rope_type, rope_type)  # its name in the first Phi-3 checkpoints
    known = sorted(["default", *_READERS])
    if rope_type not in known:
        raise UnsupportedModelError(f"rope type {rope_type!r} is not supported; known: {', '.join(known)}")
    unknown = sorted(rope.keys() - _KEYS)
    if unknown:
        raise UnsupportedModelError(f"rope_parameters with {', '.join(unknown)} are not supported")
    return rope_type


def read_rope_scaling(rope: Config) -> RopeScaling | None:
    """From the answer of ``rope_parameters``. Raises UnsupportedModelError: a value is missing or wrong."""
    return None if rope["rope_type"] == "default" else _READERS[rope["rope_type"]](rope)


def max_position_embeddings(rope: Config, scaling: RopeScaling | None) -> int:
    """The longest sequence, by vLLM's rule.

    Linear, dynamic: transformers asks that the key keep the original length, so the factor comes on top. Yarn: some
    checkpoints have the original length there (Qwen 2.5), others the stretched one, so original × factor. Llama3 and
    LongRoPE: always the stretched one.
    """
    if scaling is not None and scaling.rope_type in ("linear", "dynamic", "yarn"):
        return int(scaling.original_max_position_embeddings * scaling.factor)
    length: int = rope["max_position_embeddings"]
    return length


def _linear(rope: Config) -> RopeScaling:
    original = rope["original_max_position_embeddings"]
    return RopeScaling(rope_type="linear", original_max_position_embeddings=original, factor=_number(rope, "factor"))


def _dynamic(rope: Config) -> RopeScaling:
    """The formula's original length is ``max_position_embeddings``, whatever else is stated (transformers)."""
    original = rope["max_position_embeddings"]
    return RopeScaling(rope_type="dynamic", original_max_position_embeddings=original, factor=_number(rope, "factor"))


def _yarn(rope: Config) -> RopeScaling:
    factor = _number(rope, "factor", _stretch(rope))
    attention = yarn_attention_factor(factor, rope.get("mscale", 0), rope.get("mscale_all_dim", 0))
    return RopeScaling(
        rope_type="yarn",
        original_max_position_embeddings=rope["original_max_position_embeddings"],
        factor=factor,
        attention_factor=_number(rope, "attention_factor", attention),
        beta_fast=_number(rope, "beta_fast", 32),
        beta_slow=_number(rope, "beta_slow", 1),
        truncate=bool(rope.get("truncate", True)),
    )


def yarn_attention_factor(factor: float, mscale: float = 0, mscale_all_dim: float = 0) -> float:
    """How much longer queries and keys become (YaRN, Peng et al. 2023; the two scales are DeepSeek's)."""
    logarithm = 0.1 * math.log(max(factor, 1.0))
    if mscale and mscale_all_dim:
        return (mscale * logarithm + 1) / (mscale_all_dim * logarithm + 1)
    return logarithm + 1


def _llama3(rope: Config) -> RopeScaling:
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    if high <= low:
        raise UnsupportedModelError(f"rope_parameters: high_freq_factor {high} must exceed low_freq_factor {low}")
    return RopeScaling(
        rope_type="llama3",
        original_max_position_embeddings=rope["original_max_position_embeddings"],
        factor=_number(rope, "factor"),
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _longrope(rope: Config) -> RopeScaling:
    original, factor = rope["original_max_position_embeddings"], _number(rope, "factor", _stretch(rope))
    attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 < original else 1.0
    return RopeScaling(
        rope_type="longrope",
        original_max_position_embeddings=original,
        factor=factor,
        attention_factor=_number(rope, "attention_factor", attention),
        short_factor=_factors(rope, "short_factor"),
        long_factor=_factors(rope, "long_factor"),
    )


_READERS = {"linear": _linear, "dynamic": _dynamic, "yarn": _yarn, "llama3": _llama3, "longrope": _longrope}


def _stretch(rope: Config) -> float:
    stretch: float = rope["max_position_embeddings"] / rope["original_max_position_embeddings"]
    return stretch


def _length(config: Config, name: str, default: int) -> int:
    value = config.get(name, default)
    if type(value) is not int or value < 1:
        raise UnsupportedModelError(f"{name} must be a number of tokens, not {value!r}")
    return value


def _number(rope: Config, name: str, default: float | None = None) -> float:
    return _positive(rope.get(name, default), name)


def _factors(rope: Config, name: str) -> tuple[float, ...]:
    factors, count = rope.get(name), rope["num_frequencies"]
    if not isinstance(factors, list) or len(factors) != count:
        found = f"{len(factors)} of them" if isinstance(factors, list) else repr(factors)
        raise UnsupportedModelError(f"rope_parameters: {name} must be {count} numbers, not {found}")
    return tuple(_positive(factor, name) for factor in factors)


def _positive(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UnsupportedModelError(f"rope_parameters: {name} must be a positive number, not {value!r}")
    return float(value)
