"""ModelConfig from a checkpoint's own description: config.json of a folder, or the metadata of a GGUF file.

Reads no weights and needs no torch.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenrelay.model.config import ModelConfig, UnsupportedModelError
from tokenrelay.model.families import read_hf_config
from tokenrelay.model.weights.config_check import MAX_LAYERS, config_fault
from tokenrelay.model.weights.errors import CheckpointError
from tokenrelay.model.weights.gguf.config import config_from_gguf
from tokenrelay.model.weights.gguf.metadata import read_gguf_metadata
from tokenrelay.model.weights.sources import ModelSource

_LAYERS = ("num_hidden_layers", "num_layers", "n_layer")


def read_model_config(source: ModelSource) -> ModelConfig:
    """The network that ``source`` describes.

    Raises:
        UnsupportedModelError: a network this server cannot run.
        CheckpointError: the description is damaged or incomplete.
    """
    if source.kind == "gguf":
        return config_from_gguf(read_gguf_metadata(source.path))
    return config_from_folder(source.path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file at ``path``; CheckpointError if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(content).__name__}, not an object")
    return content


def generation_eos_ids(folder: Path) -> tuple[int, ...]:
    """The ids that end a generation according to generation_config.json, if the folder has one."""
    path = folder / "generation_config.json"
    ids = read_json(path).get("eos_token_id") if path.is_file() else None
    found = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(i) is int for i in found):
        raise CheckpointError(f"{path}: eos_token_id is {ids!r}, not an id or a list of ids")
    return tuple(found)


def config_from_folder(folder: Path) -> ModelConfig:
    path = folder / "config.json"
    described = read_json(path)
    try:
        if any(described.get(name, 0) > MAX_LAYERS for name in _LAYERS):  # readers make lists of them
            raise CheckpointError(f"{path}: describes more than {MAX_LAYERS} layers")
        config = read_hf_config(described)
    except KeyError as error:
        raise CheckpointError(f"{path}: has no {error}") from error
    except (UnsupportedModelError, CheckpointError):
        raise
    except (TypeError, ValueError, AttributeError, ArithmeticError, IndexError) as error:
        raise CheckpointError(f"{path}: holds a value of the wrong kind: {error}") from error
    if fault := config_fault(config):
        raise CheckpointError(f"{path}: {fault}")
    return replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + generation_eos_ids(folder))))
