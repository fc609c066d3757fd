"""Damages to files: to bytes, and to JSON that stays JSON."""

from __future__ import annotations

import copy
import random
import struct
from typing import Any

_EXTREMES = (0, 1, 2, 7, 8, 9, 32, 255, 65_535, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 10_000, 2**31, 2**63, -(2**63), 10**40, 0.5, -0.0, 1e-320, 1e308),
    *(float("inf"), float("nan"), "", "x", "\ud800", "../x", "F32", "[" * 2000, [], [[]], [0], [2**64], {}, {"": []}),
)


def damaged(good: bytes, chance: random.Random) -> bytes:
    """One to three damages: flipped bits, extreme numbers of any width, regions lost, doubled, swapped, inserted."""
    content = bytearray(good)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        at, length = chance.randrange(len(content) + 1), chance.choice((1, 4, 8, 30))
        match chance.randrange(8):
            case 0 | 1 if at < len(content):
                content[at] ^= 1 << chance.randrange(8)
            case 2 | 3:
                form = chance.choice("BHIQ")
                number = chance.choice(_EXTREMES) % 256 ** struct.calcsize(form)
                content[at : at + struct.calcsize(form)] = struct.pack("<" + form, number)
            case 4:
                del content[at:]
            case 5:
                content[at:at] = chance.randbytes(length)
            case 6:
                content[at:at] = content[at : at + length]
            case _:
                _swap(content, chance, length)
    return bytes(content)


def _swap(content: bytearray, chance: random.Random, length: int) -> None:
    first, second = (chance.randrange(len(content) + 1) for _ in range(2))
    one, other = content[first : first + length], content[second : second + length]
    content[first : first + length], content[second : second + length] = other, one


def changed(good: Any, chance: random.Random) -> Any:
    """The same JSON with one to three values replaced, removed, renamed or swapped."""
    root = [copy.deepcopy(good)]
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        container, key = chance.choice(list(_places(root)))
        match chance.randrange(6):
            case 0 if container is not root:
                del container[key]
            case 1 if isinstance(container, dict):
                container[chance.choice(("", "x", *container))] = container.pop(key)
            case 2:
                other, its_key = chance.choice(list(_places(root)))
                container[key] = copy.deepcopy(other[its_key])
            case _:
                container[key] = copy.deepcopy(chance.choice(_VALUES))
    return root[0]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key or index) at and below ``value``."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *_places(value[key]))]
