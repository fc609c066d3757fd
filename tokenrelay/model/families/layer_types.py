"""Which layers have a window, as ``config.json`` says it for each layer or the family does for all. No torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from tokenrelay.model.config import UnsupportedModelError
from tokenrelay.model.families.family import Config


class Windows(TypedDict):
    """The fields of ModelConfig that say it."""

    sliding_window: int
    full_attention_layers: frozenset[int]


def read_windows(config: Config, slides: Callable[[int], bool] = lambda layer: True) -> Windows:
    """From ``sliding_window`` and ``layer_types``; without the latter ``slides`` says which layers have the window."""
    window = config.get("sliding_window") or 0
    if type(window) is not int or window < 0:
        raise UnsupportedModelError(f"sliding_window must be null or a number of tokens, not {window!r}")
    if not window:
        return Windows(sliding_window=0, full_attention_layers=frozenset())
    types = _layer_types(config, slides)
    full = frozenset(layer for layer, kind in enumerate(types) if kind == "full_attention")
    return Windows(sliding_window=window, full_attention_layers=full)


def _layer_types(config: Config, slides: Callable[[int], bool]) -> list[str]:
    layers: int = config["num_hidden_layers"]
    types = config.get("layer_types")
    if types is None:
        return ["sliding_attention" if slides(layer) else "full_attention" for layer in range(layers)]
    unknown = sorted(set(types) - {"sliding_attention", "full_attention"})
    if unknown:
        raise UnsupportedModelError(f"{config['model_type']} with layer_types {', '.join(unknown)} is not supported")
    if len(types) != layers:
        raise UnsupportedModelError(f"layer_types names {len(types)} layers, the network has {layers}")
    return list(types)
