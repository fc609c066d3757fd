"""The families of networks that this server runs, by transformers' ``model_type``. No torch.

Each is a module with a reader of ``config.json`` and a table of tensor names; ``transformer.transformer`` is the one
network that they all configure. Every key that would change the result and is not built is refused by name. Checkpoints
of other formats are renamed to these keys, so that what is supported is decided here alone.
"""

from __future__ import annotations

from tokenrelay.model.config import ModelConfig, UnsupportedModelError
from tokenrelay.model.families import gpt2, llama
from tokenrelay.model.families.family import EXPERT, Config, Family, Rule

__all__ = ["EXPERT", "FAMILIES", "Config", "Family", "Rule", "read_hf_config"]

FAMILIES = {
    "gpt2": Family(gpt2.read, gpt2.RULES),
    "llama": Family(llama.read, llama.RULES),
    "mistral": Family(llama.read_mistral, llama.RULES),
}


def read_hf_config(config: Config) -> ModelConfig:
    """The network that a ``config.json`` describes.

    Raises:
        UnsupportedModelError: unknown ``model_type``, or a switch that would change the result and is not built.
        KeyError, TypeError, AttributeError, ArithmeticError: a key is missing, or its value is of the wrong kind.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise UnsupportedModelError(f"model_type {model_type!r} is not supported; known: {', '.join(sorted(FAMILIES))}")
    return family.read(config)
