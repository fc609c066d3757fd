"""Headers that stay well-formed and tell something else: values of other types, names, types and shapes exchanged."""

from __future__ import annotations

import copy
import random
from math import prod
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.gguf_writer import GGUFValue, TensorInfo

_TYPES = {
    1: ("U8", "I8", "BOOL", "F8_E4M3", "F8_E5M2"),
    2: ("F16", "BF16", "I16"),
    4: ("F32", "I32"),
    8: ("F64", "I64"),
}
_RENAMED = ((".0.", ".1."), (".1.", ".2."), ("weight", "bias"), ("q", "k"), (".", ""), ("o", "ö"))
_SCALARS: tuple[tuple[GGUFValueType, tuple[Any, ...]], ...] = (
    (GGUFValueType.UINT32, (0, 1, 2, 3, 31, 95, 96, 1000, 2**31, 2**32 - 1)),
    (GGUFValueType.INT32, (-1, 0, 5, -(2**31))),
    (GGUFValueType.UINT64, (0, 64, 2**40, 2**64 - 1)),
    (GGUFValueType.FLOAT32, (0.0, -1.0, 0.5, 3e38, float("inf"), float("nan"))),
    (GGUFValueType.FLOAT64, (1e308, 1e-320)),
    (GGUFValueType.BOOL, (True, False)),
    (GGUFValueType.STRING, ("", "x", "llama", "yarn", "longrope", "{{ 1 // 0 }}", "{%", "{{ messages[9].content }}")),
)


def retold_table(good: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """Of a safetensors file: each tensor keeps its bytes, or another's."""
    table = copy.deepcopy(good)
    for _ in range(chance.choice((1, 1, 2, 3))):
        one, other = chance.sample([name for name in table if name != "__metadata__"], 2)
        start, end = table[one]["data_offsets"]
        match chance.randrange(4):
            case 0:
                table[one], table[other] = table[other], table[one]
            case 1:
                table[one.replace(*chance.choice(_RENAMED))] = table.pop(one)
            case 2:
                table[one]["shape"] = _reshaped(table[one]["shape"], chance)
            case _:
                width = chance.choice(list(_TYPES))
                table[one] |= {"dtype": chance.choice(_TYPES[width]), "shape": [(end - start) // width]}
    return table


def write_retold_header(good: GGUFWriter, path: Path, chance: random.Random) -> None:
    """Of a GGUF file: each tensor keeps its place, and the file ends where they begin."""
    writer = GGUFWriter(path, "llama")
    writer.kv_data, writer.tensors = [dict(good.kv_data[0])], [copy.copy(good.tensors[0])]
    for _ in range(chance.choice((1, 1, 2, 3))):
        if chance.random() < 0.6:
            _retell_value(writer.kv_data[0], chance)
        else:
            _retell_tensor(writer.tensors[0], chance)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    writer.write_padding(writer.fout[0], writer.fout[0].tell())
    writer.close()


def _retell_value(values: dict[str, GGUFValue], chance: random.Random) -> None:
    one, other = chance.sample(list(values), 2)
    kind, choices = chance.choice(_SCALARS)
    match chance.randrange(5):
        case 0:
            values[one], values[other] = values[other], values[one]
        case 1:
            del values[one]
        case 2:
            items = [chance.choice(choices) for _ in range(chance.choice((1, 2, 96, 300)))]
            values[one] = GGUFValue(items, GGUFValueType.ARRAY, kind)
        case _:
            values[one] = GGUFValue(chance.choice(choices), kind)


def _retell_tensor(tensors: dict[str, TensorInfo], chance: random.Random) -> None:
    """Its place in the file depends on its size, which is left as it was."""
    one, other = chance.sample(list(tensors), 2)
    info = tensors[one]
    match chance.randrange(4):
        case 0:
            tensors[one], tensors[other] = tensors[other], info
        case 1:
            tensors[one.replace(*chance.choice(_RENAMED))] = tensors.pop(one)
        case 2:
            tensors[one] = TensorInfo(_reshaped(info.shape, chance), info.dtype, info.nbytes)
        case _:
            tensors[one] = TensorInfo(info.shape, chance.choice(list(GGMLQuantizationType)), info.nbytes)


def _reshaped(shape: Any, chance: random.Random) -> list[int]:
    size = prod(shape)
    return chance.choice((list(shape)[::-1], [size], [1, *shape], [*shape, 1], [2, size // 2], [size // 32, 32]))
