"""Where weights come from and what their files say.

This package's names need no torch (the API process imports them). Reading tensors does: that is ``checkpoint``,
with ``gguf.checkpoint`` and ``safetensors`` behind it.
"""

from __future__ import annotations

from tokenrelay.model.weights.config_reader import read_model_config
from tokenrelay.model.weights.description import ModelDescription, describe
from tokenrelay.model.weights.errors import CheckpointError, ModelSourceError
from tokenrelay.model.weights.sources import ALIASES, ModelSource, default_cache_dir, known_models, pull, resolve

__all__ = [
    "ALIASES",
    "CheckpointError",
    "ModelDescription",
    "ModelSource",
    "ModelSourceError",
    "default_cache_dir",
    "describe",
    "known_models",
    "pull",
    "read_model_config",
    "resolve",
]
