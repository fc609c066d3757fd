"""How far a client has read a stream: what ``id:`` says, and what it comes back with as ``Last-Event-ID``.

``7``: everything up to event 7 of the request's log. ``7.2``: everything before event 7, and two of the chunks it
becomes. A request with several prompts has a log for each, and a position in each: ``7,3.1,0``. So wherever a
connection breaks, every chunk reaches the client once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

from tokenrelay.service.errors import InvalidRequestError

_POSITION = re.compile(r"([0-9]{1,9})(?:\.([0-9]{1,4}))?")

T = TypeVar("T")


class _Position(NamedTuple):
    """The events seen, and how many chunks of the one behind them."""

    num_events: int = 0
    num_chunks: int = 0

    def __str__(self) -> str:
        return f"{self.num_events + 1}.{self.num_chunks}" if self.num_chunks else str(self.num_events)


class Cursor:
    """Moves on with every chunk that is sent."""

    def __init__(self, num_prompts: int) -> None:
        self._positions = [_Position()] * num_prompts

    @classmethod
    def parse(cls, text: str, num_prompts: int, param: str) -> Cursor:
        """``0`` is the beginning of any stream. Raises InvalidRequestError, which names ``param``."""
        cursor = cls(num_prompts)
        if text == "0":
            return cursor
        matches = [_POSITION.fullmatch(part) for part in text[: 16 * num_prompts].split(",")]
        if len(matches) != num_prompts or not all(matches):
            raise InvalidRequestError(
                f"'{param}' must be 0 or an id that a chunk of this request's stream carried.", param=param
            )
        cursor._positions = [_position(match[1], match[2]) for match in matches if match]
        return cursor

    @classmethod
    def behind(cls, indexes: Sequence[int]) -> Cursor:
        """The events up to these are seen."""
        cursor = cls(len(indexes))
        cursor._positions = [_Position(index) for index in indexes]
        return cursor

    def __str__(self) -> str:
        return ",".join(map(str, self._positions))

    @property
    def has_begun(self) -> bool:
        """Whether the client has seen all that comes before the second event of any log."""
        return any(position.num_events for position in self._positions)

    def num_seen(self, prompt: int) -> int:
        """Events of this prompt's log that the client has seen in full."""
        return self._positions[prompt].num_events

    def unseen(self, prompt: int, index: int, chunks: Sequence[T]) -> Iterator[tuple[str, T]]:
        """The chunks of an event that are new to the client, each with the id that says so."""
        known = self._positions[prompt]
        num_known = known.num_chunks if known.num_events == index - 1 else 0
        for number, chunk in enumerate(chunks[num_known:], num_known + 1):
            self._positions[prompt] = _Position(index - 1, number) if number < len(chunks) else _Position(index)
            yield str(self), chunk
        self._positions[prompt] = _Position(index)


def _position(index: str, num_chunks: str | None) -> _Position:
    return _Position(max(0, int(index) - 1), int(num_chunks)) if num_chunks else _Position(int(index))
