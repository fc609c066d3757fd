"""ModelConfig from a checkpoint's own description: config.json of a folder, or the metadata of a GGUF file.

Reads no weights and needs no torch. GGUF keys are renamed to those of transformers, so that one reader
(``families``) decides what is supported.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenrelay.model.config import ModelConfig, UnsupportedModelError
from tokenrelay.model.families import read_hf_config
from tokenrelay.model.weights.errors import CheckpointError
from tokenrelay.model.weights.gguf_metadata import GGUFMetadata, read_gguf_metadata
from tokenrelay.model.weights.gguf_rope import rope_parameters
from tokenrelay.model.weights.sources import ModelSource

# The end of a text, of a turn, and of a message that calls a tool: generation stops at each.
_GGUF_EOS_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
_OTHER_LLAMAS = {
    "expert_count": "mixtures of experts",
    "attention.sliding_window_pattern": "windows in some layers only",
    "rope.freq_base_swa": "windows with positions of their own",
    "rope.dimension_sections": "positions in more than one dimension",
    "rope.scaling.alpha": "rope frequencies scaled by alpha",
}


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
    except (OSError, ValueError) as error:
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


def gguf_eos_ids(metadata: GGUFMetadata) -> tuple[int, ...]:
    """The ids that end a generation according to the file's metadata."""
    found = (metadata.token_id(key) for key in _GGUF_EOS_KEYS)
    return tuple(dict.fromkeys(i for i in found if i is not None))


def config_from_folder(folder: Path) -> ModelConfig:
    path = folder / "config.json"
    try:
        config = read_hf_config(read_json(path))
    except KeyError as error:
        raise CheckpointError(f"{path}: has no {error}") from error
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: holds a value of the wrong kind: {error}") from error
    return replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + generation_eos_ids(folder))))


def config_from_gguf(metadata: GGUFMetadata) -> ModelConfig:
    rename = {"llama": _llama, "gpt2": _gpt2}.get(metadata.architecture)
    if rename is None:
        raise UnsupportedModelError(f"GGUF architecture {metadata.architecture!r} is not supported; known: gpt2, llama")
    if metadata.values.get("split.count", 1) != 1:
        raise UnsupportedModelError(f"{metadata.path} is one part of several: join them with llama-gguf-split --merge")
    common = {
        "model_type": metadata.architecture,
        "vocab_size": _vocab_size(metadata),
        "tie_word_embeddings": "output.weight" not in metadata.tensors,
        "eos_token_id": list(gguf_eos_ids(metadata)),
    }
    try:
        config = read_hf_config(common | rename(metadata))
    except ArithmeticError as error:
        raise metadata.error(f"holds a value out of range: {error}") from error
    _check_tensor_table(config, metadata)
    if config.architecture != "gpt2":
        # convert_hf_to_gguf writes no switch for these; the tensors themselves say it
        return replace(
            config,
            attention_bias="blk.0.attn_q.bias" in metadata.tensors,
            output_bias="blk.0.attn_output.bias" in metadata.tensors,
            mlp_bias="blk.0.ffn_up.bias" in metadata.tensors,
        )
    return config


def _vocab_size(metadata: GGUFMetadata) -> int:
    embeddings = metadata.tensors.get("token_embd.weight")
    if embeddings is None or len(embeddings.shape) != 2:
        raise metadata.error("has no two-dimensional tensor token_embd.weight")
    return embeddings.shape[0]


def _check_tensor_table(config: ModelConfig, metadata: GGUFMetadata) -> None:
    """Refuse counts that the tensors contradict, before a network of that size is allocated."""
    expected = {
        "token_embd.weight": (config.vocab_size, config.hidden_size),
        f"blk.{config.num_layers - 1}.attn_norm.weight": (config.hidden_size,),
        "blk.0.ffn_up.weight": (config.intermediate_size, config.hidden_size),
    }
    for name, shape in expected.items():
        info = metadata.tensors.get(name)
        if info is None or info.shape != shape:
            raise metadata.error(
                f"tensor {name!r} should have shape {shape}, not {info.shape if info else 'be missing'}"
            )


def _llama(metadata: GGUFMetadata) -> dict[str, Any]:
    _refuse_other_llamas(metadata)
    heads = metadata.count("llama.attention.head_count")
    hidden = metadata.count("llama.embedding_length")
    head_dim = metadata.count("llama.attention.key_length", max(1, hidden // heads))
    same = ("llama.attention.value_length", "llama.rope.dimension_count")
    if any(metadata.count(key, head_dim) != head_dim for key in same):
        raise UnsupportedModelError(
            f"{metadata.path}: rope on part of a head, or another size for values, is not built"
        )
    return {
        "hidden_size": hidden,
        "intermediate_size": metadata.count("llama.feed_forward_length"),
        "num_hidden_layers": metadata.count("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.count("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.count("llama.context_length"),
        "rms_norm_eps": metadata.number("llama.attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope_parameters(metadata, head_dim),
        **_window(metadata),
    }


def _window(metadata: GGUFMetadata) -> dict[str, Any]:
    """Mistral's files are of architecture llama; a window, if there is one, tells them apart."""
    key = "llama.attention.sliding_window"
    return {"model_type": "mistral", "sliding_window": metadata.count(key)} if metadata.values.get(key) else {}


def _refuse_other_llamas(metadata: GGUFMetadata) -> None:
    """Networks that share the architecture's name, and would give plausible nonsense if run as a plain one."""
    for key, what in _OTHER_LLAMAS.items():
        if metadata.values.get(f"llama.{key}"):
            raise UnsupportedModelError(f"{metadata.path}: {what} ({key}) are not supported")


def _gpt2(metadata: GGUFMetadata) -> dict[str, Any]:
    return {
        "n_embd": metadata.count("gpt2.embedding_length"),
        "n_inner": metadata.count("gpt2.feed_forward_length"),
        "n_layer": metadata.count("gpt2.block_count"),
        "n_head": metadata.count("gpt2.attention.head_count"),
        "n_positions": metadata.count("gpt2.context_length"),
        "layer_norm_epsilon": metadata.number("gpt2.attention.layer_norm_epsilon"),
    }
