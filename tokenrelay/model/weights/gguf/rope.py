"""Rope scaling of a GGUF file, renamed to transformers' ``rope_parameters``. No torch.

llama.cpp keeps scalars in the metadata, and lists (one divisor per frequency) in small tensors of their own.
"""

from __future__ import annotations

import math
import struct
from typing import Any

from tokenrelay.model.config import UnsupportedModelError
from tokenrelay.model.families.rope_parameters import yarn_attention_factor
from tokenrelay.model.weights.gguf.metadata import GGUFMetadata

_LLAMA3, _LONG, _SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
_F32 = 0


def gguf_rope_parameters(metadata: GGUFMetadata, rotary_dim: int) -> dict[str, Any]:
    """What ``families.rope_parameters`` reads as ``rope_parameters``.

    Raises:
        UnsupportedModelError: a type, or a combination, that is not built.
        CheckpointError: a value or a tensor is damaged or missing.
    """
    rope_type = _rope_type(metadata)
    rope = {"rope_theta": metadata.number(f"{metadata.architecture}.rope.freq_base", 10_000.0)}
    match rope_type:
        case "yarn":
            return rope | _yarn(metadata)
        case "longrope":
            return rope | _longrope(metadata, rotary_dim)
    if metadata.number(_key(metadata, "attn_factor"), 1.0) != 1.0:
        raise UnsupportedModelError(
            f"{metadata.path}: rope.scaling.attn_factor without yarn or longrope is not supported"
        )
    match rope_type:
        case "linear":
            return rope | _linear(metadata)
        case "llama3":
            return rope | _llama3(metadata, rotary_dim)
    return rope


def _key(metadata: GGUFMetadata, name: str) -> str:
    return f"{metadata.architecture}.rope.scaling.{name}"


def _rope_type(metadata: GGUFMetadata) -> str:
    """What the type's key says, or its tensors: Llama 3's and Phi-3's files state no type beside them."""
    stated, known = metadata.string(_key(metadata, "type"), "linear"), ("none", "linear", "yarn", "longrope")
    if stated not in known:
        raise UnsupportedModelError(
            f"{metadata.path}: rope type {stated!r} is not supported; known: {', '.join(known)}"
        )
    if stated == "linear" and _factor(metadata) == 1.0:  # llama.cpp's default
        stated = "none"
    found = "llama3" if _LLAMA3 in metadata.tensors else "longrope" if _LONG in metadata.tensors else stated
    if stated not in ("none", found):
        raise UnsupportedModelError(
            f"{metadata.path}: factors of {found} beside rope type {stated!r} are not supported"
        )
    return found


def _factor(metadata: GGUFMetadata) -> float:
    """The positions' divisor; before 2023-11 it had another name, and 0 means none."""
    before = metadata.number(f"{metadata.architecture}.rope.scale_linear", 1.0)
    factor = metadata.number(_key(metadata, "factor"), before) or 1.0
    if not 0 < factor < math.inf:
        raise metadata.error(f"rope.scaling.factor is {factor}, but must be a positive number")
    return factor


def _linear(metadata: GGUFMetadata) -> dict[str, Any]:
    """Unlike ``max_position_embeddings``, ``context_length`` is the trained length, with the factor in it."""
    factor = _factor(metadata)
    trained = metadata.count(f"{metadata.architecture}.context_length")
    unstretched = {"original_max_position_embeddings": max(1, int(trained / max(factor, 1.0)))}
    return {"rope_type": "linear", "factor": factor} | unstretched | _original(metadata)


def _original(metadata: GGUFMetadata) -> dict[str, int]:
    key = _key(metadata, "original_context_length")
    return {"original_max_position_embeddings": metadata.count(key)} if key in metadata.values else {}


def _yarn(metadata: GGUFMetadata) -> dict[str, Any]:
    """llama.cpp's ``attn_factor`` multiplies what follows from the factor, and ``yarn_attn_factor`` replaces both: its
    converter writes transformers' ``attention_factor`` there."""
    if metadata.number(_key(metadata, "yarn_ext_factor"), 1.0) != 1.0:
        raise UnsupportedModelError(f"{metadata.path}: rope.scaling.yarn_ext_factor other than 1 is not supported")
    factor, log_multiplier = _factor(metadata), metadata.number(_key(metadata, "yarn_log_multiplier"), 0.0)
    attention = yarn_attention_factor(factor, 1.0, log_multiplier) * metadata.number(_key(metadata, "attn_factor"), 1.0)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "attention_factor": metadata.number(_key(metadata, "yarn_attn_factor"), attention),
        "beta_fast": metadata.number(_key(metadata, "yarn_beta_fast"), 32.0),
        "beta_slow": metadata.number(_key(metadata, "yarn_beta_slow"), 1.0),
        **_original(metadata),
    }


def _llama3(metadata: GGUFMetadata, rotary_dim: int) -> dict[str, Any]:
    """The finished divisors of Llama 3's formula: LongRoPE's form, the same for every length."""
    factors = _vector(metadata, _LLAMA3, rotary_dim // 2)
    return {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0}


def _longrope(metadata: GGUFMetadata, rotary_dim: int) -> dict[str, Any]:
    """As in llama.cpp, a file without ``attn_factor`` has none."""
    if _factor(metadata) != 1.0:
        raise UnsupportedModelError(
            f"{metadata.path}: rope.scaling.factor beside the factors of longrope is not supported"
        )
    return {
        "rope_type": "longrope",
        "short_factor": _vector(metadata, _SHORT, rotary_dim // 2),
        "long_factor": _vector(metadata, _LONG, rotary_dim // 2),
        "attention_factor": metadata.number(_key(metadata, "attn_factor"), 1.0),
        **_original(metadata),
    }


def _vector(metadata: GGUFMetadata, name: str, length: int) -> list[float]:
    """The values of a small F32 tensor."""
    info = metadata.tensors.get(name)
    if info is None or info.shape != (length,) or info.ggml_type != _F32:
        raise metadata.error(f"needs a tensor {name!r} of {length} F32 values, one per frequency")
    size = 4 * length
    if info.offset + size > info.path.stat().st_size:
        raise metadata.error(f"tensor {name!r} ends at byte {info.offset + size}, after the file: truncated")
    with info.path.open("rb") as file:
        file.seek(info.offset)
        return list(struct.unpack(f"<{length}f", file.read(size)))
