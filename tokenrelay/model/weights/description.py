"""What a model is, for people and front-ends: its family, size and type, from its files' own words."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.weights.config_reader import read_json
from tokenrelay.model.weights.gguf.metadata import gguf_parts, read_gguf_metadata
from tokenrelay.model.weights.sources import ModelSource

_GGML_TYPES = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 30: "BF16", 39: "MXFP4"},
    **{10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS"},
}
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """Zeros and empty strings stand for what is not known."""

    file_format: str = ""
    family: str = ""
    num_parameters: int = 0
    weight_type: str = ""  # of most weights
    size: int = 0  # bytes on disk
    modified_at: float = 0.0  # Unix time


def describe(source: ModelSource, config: ModelConfig) -> ModelDescription:
    """Reads no weights."""
    files = gguf_parts(source.path) if source.kind == "gguf" else sorted(source.path.glob("*.safetensors"))
    num_parameters, weight_type = _gguf(source.path) if source.kind == "gguf" else _folder(source.path, config)
    return ModelDescription(
        file_format="gguf" if source.kind == "gguf" else "safetensors",
        family=config.architecture,
        num_parameters=num_parameters,
        weight_type=weight_type,
        size=sum(file.stat().st_size for file in files),
        modified_at=max((file.stat().st_mtime for file in files), default=0.0),
    )


def _gguf(path: Path) -> tuple[int, str]:
    sizes: Counter[int] = Counter()
    for tensor in read_gguf_metadata(path).tensors.values():
        sizes[tensor.ggml_type] += math.prod(tensor.shape)
    [(most, _)] = sizes.most_common(1) or [(-1, 0)]
    return sum(sizes.values()), _GGML_TYPES.get(most, "")


def _folder(path: Path, config: ModelConfig) -> tuple[int, str]:
    described = read_json(path / "config.json")
    return config.num_weights, _DTYPES.get(str(described.get("dtype") or described.get("torch_dtype")), "")
