"""The header of one GGUF file: key-value pairs and the table of tensors, without the tensors' data.

Reads every length before trusting it, so a truncated or lying file ends in a CheckpointError. Needs neither torch
nor numpy, and takes some hundredths of a second where a reader that wraps each string in an array takes seconds.
"""

from __future__ import annotations

import mmap
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenrelay.model.weights.errors import CheckpointError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_STRINGS = 1 << 22  # of one array; the largest vocabularies hold a few hundred thousand
_MAX_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One row of the tensor table. ``shape`` is outermost first, as torch has it; ``offset`` is within the file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int


class Header(NamedTuple):
    """What one file says; of several parts, the first has the values that concern all of them."""

    values: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Version 2 or 3, little-endian.

    Raises:
        CheckpointError: not a GGUF file, truncated, or with lengths that do not fit the file.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(path, _Cursor(path, data))
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot be read as a GGUF file: {error}") from error


class _Cursor:
    """A position in the file, and reads that refuse to leave it."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self.position, self.size = path, data, 0, len(data)

    def take(self, length: int) -> bytes:
        start = self.position
        if length > self.size - start:
            raise self.error(f"needs {length} bytes at {start}, but the file ends at {self.size}: truncated or damaged")
        self.position = start + length
        return self._data[start : self.position]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        raw = self.take(self.scalar("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"a string before byte {self.position} is not UTF-8") from error

    def strings(self, count: int) -> list[str]:
        if count > min(_MAX_STRINGS, (self.size - self.position) // 8):
            raise self.error(f"an array claims {count} strings, which the file cannot hold")
        return self._decoded(count)

    def _decoded(self, count: int) -> list[str]:
        """The loop over a vocabulary: what ``string`` does, without a call per length and per text."""
        data, position, size, texts = self._data, self.position, self.size, []
        for _ in range(count):
            end = position + 8
            length = int.from_bytes(data[position:end], "little")
            position = end + length
            if position > size:
                raise self.error(f"a string at {end} claims {length} bytes, but the file ends at {size}")
            texts.append(data[end:position])
        self.position = position
        try:
            return [text.decode() for text in texts]
        except UnicodeDecodeError as error:
            raise self.error(f"an array of strings before byte {position} holds one that is not UTF-8") from error

    def numbers(self, code: str, count: int) -> array[Any]:
        numbers = array("B" if code == "?" else code)
        numbers.frombytes(self.take(count * struct.calcsize("<" + code)))
        return numbers

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {what}")


def _read(path: Path, cursor: _Cursor) -> Header:
    if cursor.take(4) != b"GGUF":
        raise cursor.error("is not a GGUF file: it does not begin with the letters GGUF")
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise cursor.error(f"GGUF version {version} is not supported; 2 and 3 (little-endian) are")
    num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
    values: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.string()
        values[key] = _value(cursor, cursor.scalar("I"))
    rows = [_tensor_row(cursor) for _ in range(num_tensors)]
    start = _data_start(cursor, values.get("general.alignment", 32))
    tensors = {name: TensorInfo(path, name, shape, kind, start + offset) for name, shape, kind, offset in rows}
    if len(tensors) != len(rows):
        raise cursor.error("names a tensor twice")
    return Header(values, tensors)


def _value(cursor: _Cursor, kind: int) -> Any:
    if kind in _SCALARS:
        return cursor.scalar(_SCALARS[kind])
    if kind == _STRING:
        return cursor.string()
    if kind != _ARRAY:
        raise cursor.error(f"metadata value of unknown type {kind} at byte {cursor.position}")
    item, count = cursor.scalar("I"), cursor.scalar("Q")
    if item == _STRING:
        return cursor.strings(count)
    if item not in _SCALARS:
        raise cursor.error(f"metadata array of unsupported item type {item} at byte {cursor.position}")
    return cursor.numbers(_SCALARS[item], count)


def _tensor_row(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, num_dimensions = cursor.string(), cursor.scalar("I")
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise cursor.error(f"tensor {name!r} claims {num_dimensions} dimensions")
    shape = tuple(cursor.scalar("Q") for _ in range(num_dimensions))
    if 0 in shape:
        raise cursor.error(f"tensor {name!r} has an empty dimension: {shape}")
    return name, shape[::-1], cursor.scalar("I"), cursor.scalar("Q")


def _data_start(cursor: _Cursor, alignment: Any) -> int:
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment is {alignment!r}, but must be a power of two")
    return -(-cursor.position // alignment) * alignment
