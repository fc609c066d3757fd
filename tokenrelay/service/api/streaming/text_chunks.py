"""Most chunks differ from each other in their text only: the rest of their JSON is written once."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import BaseModel
from pydantic_core import to_json


class TextChunks:
    """The JSON of each choice's chunks that have nothing but text, as ``chunk_of`` makes them."""

    def __init__(self, chunk_of: Callable[[int, str], BaseModel]) -> None:
        self._chunk_of = chunk_of
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def json(self, choice: int, text: str) -> bytes:
        if choice not in self._frames:
            self._frames[choice] = self._frame(choice)
        before, behind = self._frames[choice]
        return before + to_json(text) + behind

    def _frame(self, choice: int) -> tuple[bytes, bytes]:
        """What stands around the text: the only difference between the JSON of two texts."""
        plain, marked = (self._chunk_of(choice, text).model_dump_json(exclude_unset=True) for text in ("", "\0"))
        length = next(i for i, (one, other) in enumerate(zip(plain, marked, strict=False)) if one != other) - 1
        return marked[:length].encode(), plain[length + len('""') :].encode()
