"""Finds stop strings in text that arrives in pieces. Knows no tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Matched(NamedTuple):
    """Text that may be shown now, and whether a stop string ended it."""

    text: str
    stopped: bool


class StopStringMatcher:
    """Holds back the text that may still become a stop string; the stop string itself is never shown."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def append(self, text: str) -> Matched:
        """Add new text. After a match, nothing more may be appended."""
        self._held += text
        found = [position for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if found:
            return Matched(self._held[: min(found)], True)
        keep = self._num_pending()
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return Matched(shown, False)

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _num_pending(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
