"""Rotary position embeddings (RoFormer, Su et al. 2021) and the ways checkpoints stretch them: one table per server.

A token's rotation must not depend on other requests, on its own request's later length, or on when it was computed
(keys stay in the cache, and a request may move to another worker). So where transformers chooses frequencies by the
length of the sequence at hand, here the server's max_model_len decides, once:

- dynamic NTK takes max_model_len as the sequence length;
- LongRoPE takes the long factors if max_model_len exceeds the original length, else the short ones (vLLM's rule).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tokenrelay.model.config import ModelConfig, RopeScaling


def rotary_table(config: ModelConfig, max_len: int) -> Tensor:
    """cos, then sin, of the angles of the positions below ``max_len``: [max_len, R] fp32; R elements of a head turn.

    Angles are rounded to fp32, as in transformers. The attention factor of yarn and LongRoPE is multiplied in.
    """
    return _rows(config, torch.arange(max_len, dtype=torch.float32), max_len)


def local_rotary_table(config: ModelConfig, max_len: int) -> Tensor:
    """As ``rotary_table``, for the layers with a window where these have a theta of their own. (Gemma 3)"""
    return rotary_table(replace(config, rope_theta=config.local_rope_theta, rope_scaling=None), max_len)


def rotary_rows(config: ModelConfig, positions: Tensor, table: Tensor) -> Tensor:
    """The rows of ``positions`` [T] int64 → [T, R] fp32, without an upper limit.

    From the table where it has them. Beyond its end, its frequencies times the position in float64, rounded at last:
    an fp32 angle would be off by 0.03 at position 2**19. Each row is a function of its position alone.
    """
    end = table.shape[0]
    beyond = _rows(config, positions.double(), end).float()
    return torch.where((positions < end).unsqueeze(1), table[positions.clamp(max=end - 1)], beyond)


def _rows(config: ModelConfig, positions: Tensor, max_len: int) -> Tensor:
    """[T] positions → [T, R], in the positions' type."""
    angles = positions.unsqueeze(1) * _frequencies(config, max_len).to(positions)
    attention_factor = config.rope_scaling.attention_factor if config.rope_scaling else 1.0
    return torch.cat([angles.cos(), angles.sin()], dim=1).mul_(attention_factor)


def _frequencies(config: ModelConfig, max_len: int) -> Tensor:
    """Radians per position: [R / 2] fp32, computed on the CPU, so that every device has the same.

    Operations and their order are those of transformers: an ulp here is a hundredth of a radian at position 100,000.
    """
    scaling, theta, dim = config.rope_scaling, config.rope_theta, config.rotary_dim or config.head_dim
    if scaling is None:
        return 1.0 / _radii(theta, dim)
    return _SCALED[scaling.rope_type](scaling, theta, dim, max_len)


def _radii(theta: float, dim: int) -> Tensor:
    """Positions per radian, unscaled: theta to the power of 0, 2/dim, 4/dim, … [dim / 2]."""
    return torch.pow(theta, torch.arange(0, dim, 2).float() / dim)


def _linear(scaling: RopeScaling, theta: float, dim: int, max_len: int) -> Tensor:
    """Position interpolation (Chen et al. 2023)."""
    return 1.0 / _radii(theta, dim) / scaling.factor


def _dynamic(scaling: RopeScaling, theta: float, dim: int, max_len: int) -> Tensor:
    """NTK-aware scaling for a given length (bloc97 and emozilla, 2023): a larger theta beyond the original length."""
    original = scaling.original_max_position_embeddings
    stretch = scaling.factor * max(max_len, original) / original - (scaling.factor - 1)
    return 1.0 / _radii(theta * stretch ** (dim / (dim - 2)), dim)


def _yarn(scaling: RopeScaling, theta: float, dim: int, max_len: int) -> Tensor:
    """NTK by parts (YaRN, Peng et al. 2023): fast frequencies are kept, slow ones interpolated, between is a ramp."""
    low, high = _yarn_index(scaling.beta_fast, scaling, theta, dim), _yarn_index(scaling.beta_slow, scaling, theta, dim)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    kept = 1 - ((torch.arange(dim // 2).float() - low) / ((high - low) or 0.001)).clamp(0, 1)
    radii = _radii(theta, dim)
    return 1.0 / (scaling.factor * radii) * (1 - kept) + 1.0 / radii * kept


def _yarn_index(turns: float, scaling: RopeScaling, theta: float, dim: int) -> float:
    """Which frequency, as a fractional index, makes so many turns within the original length."""
    radius = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
    return (dim * math.log(radius)) / (2 * math.log(theta))


def _llama3(scaling: RopeScaling, theta: float, dim: int, max_len: int) -> Tensor:
    """Llama 3.1's: as yarn, but the ramp is over the number of turns within the original length."""
    frequencies = 1.0 / _radii(theta, dim)
    turns = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _longrope(scaling: RopeScaling, theta: float, dim: int, max_len: int) -> Tensor:
    """A divisor per frequency, found by search (LongRoPE, Ding et al. 2024)."""
    long = max_len > scaling.original_max_position_embeddings
    factors = torch.tensor(scaling.long_factor if long else scaling.short_factor, dtype=torch.float32)
    return 1.0 / (factors * _radii(theta, dim))


_SCALED: dict[str, Callable[[RopeScaling, float, int, int], Tensor]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
