"""An adapter from its folder into memory. Reads and packs beside the engine's thread, which only takes the result."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenrelay.model.transformer.lora import Adapter, Part, update
from tokenrelay.model.transformer.transformer import Transformer
from tokenrelay.model.weights.layouts import LAYOUTS
from tokenrelay.model.weights.lora import TENSORS_FILE, LoRA, Matrix, digest_of, read_lora
from tokenrelay.model.weights.lora_config import LoRAError


def load_adapter(folder: Path, digest: str, model: Transformer, max_rank: int) -> Adapter:
    """Made ready for ``model``. Raises LoRAError for files that are not those of ``digest``, or do not fit."""
    lora = read_lora(folder, model.config, max_rank)
    parts: dict[str, list[Part]] = defaultdict(list)
    try:
        for matrix, a, b in _tensors(folder, lora):
            rows = LAYOUTS[matrix.layout](b, model.config) if matrix.layout else b
            parts[matrix.target].append(Part(matrix.first, a, rows, matrix.scale))
        if digest_of(folder) != digest:  # only now: they might have changed while they were read
            raise LoRAError(f"{folder} has other content than when it was loaded; load it again")
    except (SafetensorError, OSError) as error:
        raise LoRAError(f"{folder}: {error}") from error
    return {target: update(own, model) for target, own in parts.items()}


def _tensors(folder: Path, lora: LoRA) -> Iterator[tuple[Matrix, Tensor, Tensor]]:
    with safe_open(folder / TENSORS_FILE, framework="pt") as file:
        for matrix in lora.matrices:
            yield (
                matrix,
                file.get_tensor(matrix.a).clone(),
                file.get_tensor(matrix.b).clone(),
            )  # or they follow the file
