"""What a family of networks is: a reader of its configuration and a table of its tensors' names. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tokenrelay.model.config import Activation, ModelConfig, UnsupportedModelError

Config = Mapping[str, Any]
EXPERT = "{expert}"


class Rule(NamedTuple):
    """Where a checkpoint's tensors of one kind go."""

    pattern: str  # of the checkpoint's name: a regular expression for all of it
    target: str  # our name, with the pattern's groups; empty: what it holds is computed here; with EXPERT: a stack
    shard: str = ""  # which rows of a merged matrix: q, k, v, gate or up
    layout: str = ""  # how it, or an expert's part of it, is stored, if not as we have it: of ``weights.layouts``


class Family(NamedTuple):
    """One or several ``model_type`` of transformers that share their tensors' names."""

    read: Callable[[Config], ModelConfig]  # UnsupportedModelError; KeyError, TypeError, AttributeError, ArithmeticError
    rules: tuple[Rule, ...]


_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


def activation(name: str) -> Activation:
    """By transformers' name. Raises UnsupportedModelError."""
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(f"activation {name!r} is not supported; known: {', '.join(sorted(_ACTIVATIONS))}")
    return _ACTIVATIONS[name]


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """``eos_token_id``, which may be an id, several or none."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def stated(config: Config, **defaults: Any) -> dict[str, Any]:
    """The file's words, and transformers' for the family where it is silent: published files leave keys out."""
    return defaults | dict(config)


def either(config: Config, *names: str) -> Any:
    """The value under the first of these names that the file has (KeyError: none); transformers renamed some keys."""
    return config[next((name for name in names if name in config), names[0])]


def refuse(config: Config, *switches: str) -> None:
    """UnsupportedModelError if one of these is set: it would change the result and is not built."""
    for switch in switches:
        if config.get(switch):
            raise UnsupportedModelError(f"{config.get('model_type')} with {switch}={config[switch]!r} is not supported")
