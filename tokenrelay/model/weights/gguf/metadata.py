"""What a GGUF file says of its network and tokenizer, by key, and where its tensors are. No torch.

A large model is split: ``NAME-00001-of-00003.gguf`` has the metadata, and each part a table of the tensors in it.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tokenrelay.model.weights.errors import CheckpointError
from tokenrelay.model.weights.gguf.header import Header, TensorInfo, read_header

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GGUFMetadata:
    """What the header says. The typed getters raise CheckpointError where a value is missing or of another type."""

    path: Path
    values: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @property
    def architecture(self) -> str:
        return self.string("general.architecture")

    def string(self, key: str, default: str | None = None) -> str:
        return self._typed(key, str, default)

    def boolean(self, key: str, default: bool | None = None) -> bool:
        return self._typed(key, bool, default)

    def number(self, key: str, default: float | None = None) -> float:
        return self._typed(key, float, default)

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number of at least one."""
        value = self._typed(key, int, default)
        if value < 1:
            raise self.error(f"{key} is {value}, but must be at least 1")
        return value

    def token_id(self, key: str) -> int | None:
        return self._typed(key, int) if key in self.values else None

    def strings(self, key: str) -> list[str]:
        return self._typed(key, list)

    def numbers(self, key: str) -> Sequence[float]:
        return self._typed(key, array)

    def integers(self, key: str) -> Sequence[int]:
        values = self._typed(key, array)
        if values.typecode in "fd":
            raise self.error(f"metadata key {key!r} holds fractions, not whole numbers")
        return values

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")

    def _typed(self, key: str, kind: type[T], default: T | None = None) -> T:
        value = self.values.get(key, default)
        if value is None:
            raise self.error(f"metadata key {key!r} is missing")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):  # a bool is an int
            raise self.error(f"metadata key {key!r} holds a {type(value).__name__}, not a {kind.__name__}")
        return value


def gguf_parts(path: Path) -> list[Path]:
    """The files of the model that one of them belongs to, the first part first. They may not exist."""
    name = _PART.fullmatch(path.name)
    if name is None:
        return [path]
    return [path.with_name(f"{name[1]}-{part:05d}-of-{name[3]}.gguf") for part in range(1, int(name[3]) + 1)]


def read_gguf_metadata(path: Path) -> GGUFMetadata:
    """Of the GGUF file at ``path``, or of all parts of the model if it is one of several.

    Raises:
        CheckpointError: damaged, or parts that are missing or do not belong together.
    """
    header = read_header(path)
    count = header.values.get("split.count", 0)
    if type(count) is not int or count <= 1:
        return GGUFMetadata(path, *header)
    paths = gguf_parts(path)
    if len(paths) != count:
        raise CheckpointError(
            f"{path}: is one of {count} parts, so its name must end in -00001-of-{count:05d}.gguf, or another number"
        )
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise CheckpointError(f"{path}: is one of {count} parts, and of these {', '.join(missing[:8])} is missing")
    return _joined(paths, [read_header(part) for part in paths])


def _joined(paths: Sequence[Path], headers: Sequence[Header]) -> GGUFMetadata:
    tensors: dict[str, TensorInfo] = {}
    for number, (path, header) in enumerate(zip(paths, headers, strict=True)):
        stated = header.values.get("split.no"), header.values.get("split.count")
        if stated != (number, len(paths)):
            raise CheckpointError(f"{path}: says it is part {stated[0]} (from 0) of {stated[1]}, unlike its name")
        twice = tensors.keys() & header.tensors.keys()
        if twice:
            raise CheckpointError(f"{path}: has tensor {min(twice)!r}, as another part has")
        tensors |= header.tensors
    expected = headers[0].values.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise CheckpointError(f"{paths[0]}: the parts hold {len(tensors)} tensors, not {expected}")
    return GGUFMetadata(paths[0], headers[0].values, tensors)
