"""Where a checkpoint's tensors go: each gets our name and our layout by the checkpoint's rules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families import EXPERT, Rule
from tokenrelay.model.quantized import Quantized
from tokenrelay.model.weights.layouts import LAYOUTS, ROW_ORDERS


class WeightsError(ValueError):
    """The checkpoint's tensors do not fit its configuration; the message names them."""


class Placed(NamedTuple):
    """A tensor laid out as ours, and where it goes."""

    name: str  # the checkpoint's
    target: str  # ours; empty: nowhere
    shard: str  # which rows of a merged matrix
    tensor: Tensor | Quantized


def placed(
    tensors: Iterable[tuple[str, Tensor | Quantized]], rules: Sequence[Rule], config: ModelConfig
) -> Iterator[Placed]:
    """Each tensor in turn; a stack of experts' is taken apart. Raises WeightsError: one that fits no rule."""
    for name, tensor in tensors:
        target, shard, layout = _place(name, rules)
        if EXPERT not in target:
            yield Placed(name, target, shard, _laid_out(name, layout, tensor, config))
            continue
        if not tensor.shape:
            raise WeightsError(f"tensor {name!r} is one number, not a stack of experts")
        for expert, own in enumerate(_unstacked(tensor)):
            yield Placed(name, target.replace(EXPERT, str(expert)), shard, _laid_out(name, layout, own, config))


def _place(name: str, rules: Sequence[Rule]) -> tuple[str, str, str]:
    """Our name, the rows of it, and the layout; WeightsError if no rule knows the tensor."""
    for rule in rules:
        match = re.fullmatch(rule.pattern, name)
        if match:
            return match.expand(rule.target), match.expand(rule.shard), rule.layout
    raise WeightsError(f"tensor {name!r} has no place in a network of this family")


def _unstacked(tensor: Tensor | Quantized) -> Iterator[Tensor | Quantized]:
    """What is stored for every expert: [E, …] → E times […]."""
    for expert in range(tensor.shape[0]):
        if isinstance(tensor, Quantized):
            yield Quantized(tensor[0][expert], tensor[1][expert], None if tensor[2] is None else tensor[2][expert])
        else:
            yield tensor[expert]


def _laid_out(name: str, layout: str, stored: Tensor | Quantized, config: ModelConfig) -> Tensor | Quantized:
    """As our network holds it. A quantized matrix stays so where only its rows move."""
    if not layout:
        return stored
    try:
        if not isinstance(stored, Quantized):
            return LAYOUTS[layout](stored, config)
        if layout in ROW_ORDERS:
            return stored.mapped(lambda rows: LAYOUTS[layout](rows, config))
        return LAYOUTS[layout](stored.dequantized(), config)
    except (RuntimeError, IndexError) as error:
        raise WeightsError(f"tensor {name!r} of shape {list(stored.shape)} is not {layout}: {error}") from error
