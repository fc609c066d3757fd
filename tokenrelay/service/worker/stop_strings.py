"""Finds stop strings in text that arrives in pieces. Knows no tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Matched(NamedTuple):
    """Text that may be shown now, and the stop string that ended it, if one did."""

    text: str
    stop: str = ""


class StopStringMatcher:
    """Ends the text with the stop string that is complete first, and of several complete at once the longest.

    So the result does not depend on where the pieces are cut. Text that may still become a stop string is held back;
    with ``include``, stop strings are part of the text, and nothing is.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._pending = ""  # the end of the text, as far as a stop string may begin in it
        self._num_shown = 0  # of it
        self._num_protected = 0  # of it: no stop string may end there

    def append(self, text: str, *, may_stop: bool = True) -> Matched:
        """Add new text; without ``may_stop``, no stop string ends in it. After a match, nothing more may be added."""
        self._pending += text
        if not may_stop:
            self._num_protected = len(self._pending)
        if match := self._first_match():
            start, end = match
            shown = self._pending[self._num_shown : end if self._include else start]
            return Matched(shown, self._pending[start:end])
        num_pending = self._num_pending()
        shown = self._show(len(self._pending) - (0 if self._include else num_pending))
        self._forget(len(self._pending) - num_pending)
        return Matched(shown)

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        return self._show(len(self._pending))

    def _first_match(self) -> tuple[int, int] | None:
        """Its start and its end."""
        ends = []
        for stop in self._stops:
            start = self._pending.find(stop, max(0, self._num_protected + 1 - len(stop)))
            if start >= 0:
                ends.append((start + len(stop), start))
        return min(ends)[::-1] if ends else None

    def _num_pending(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._pending)), 0, -1):
            if any(stop.startswith(self._pending[-length:]) for stop in self._stops):
                return length
        return 0

    def _show(self, end: int) -> str:
        shown = self._pending[self._num_shown : end]
        self._num_shown = max(self._num_shown, end)
        return shown

    def _forget(self, num_characters: int) -> None:
        self._pending = self._pending[num_characters:]
        self._num_shown = max(0, self._num_shown - num_characters)
        self._num_protected = max(0, self._num_protected - num_characters)
