"""Text that comes in pieces, for parsers written as generators: each ``yield`` waits for more of it.

What is not consumed is kept only as far as a literal may still be completed, so the work is linear in the text however
it is cut.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from functools import cache
from typing import TypeVar

T = TypeVar("T")
Parsing = Generator[None, None, T]


class Reader:
    """A position in the text so far. ``ended``: nothing more will come. ``taken``: what was consumed, until drained."""

    def __init__(self) -> None:
        self.ended = False
        self.taken: list[str] = []
        self._text = ""
        self._at = 0

    def feed(self, text: str) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0

    def drain(self) -> str:
        """What was consumed since the last call."""
        taken = "".join(self.taken)
        self.taken.clear()
        return taken

    @property
    def num_kept(self) -> int:
        """Characters that are there and not consumed."""
        return len(self._text) - self._at

    @property
    def at_end(self) -> bool:
        """Whether nothing is there at this moment."""
        return self._at == len(self._text)

    def take(self, count: int) -> str:
        """Consume so many characters, or what is there of them."""
        piece = self._text[self._at : self._at + count]
        self._at += len(piece)
        self.taken.append(piece)
        return piece

    def run(self, pattern: re.Pattern[str]) -> str:
        """Consume what matches here, of what is there. The pattern may match nothing, and has no end of its own."""
        match = pattern.match(self._text, self._at)
        return self.take(match.end() - self._at) if match else ""

    def peek(self) -> Parsing[str]:
        """The next character, or "" at the end of all text."""
        while self.at_end and not self.ended:
            yield
        return self._text[self._at : self._at + 1]

    def which(self, literals: Sequence[str]) -> Parsing[str]:
        """The literal that stands here, the first that fits, or ""; nothing is consumed."""
        while True:
            here = self._text[self._at : self._at + max(map(len, literals), default=0)]
            found = next((literal for literal in literals if here.startswith(literal)), "")
            undecided = any(len(literal) > len(here) and literal.startswith(here) for literal in literals)
            if found or self.ended or not undecided:
                return found
            yield

    def before(self, literals: Sequence[str]) -> str:
        """Consume what is there and cannot belong to one of the literals."""
        found = _any_of(tuple(literals)).search(self._text, self._at)
        if found:
            return self.take(found.start() - self._at)
        return self.take(self.num_kept - (0 if self.ended else self._begun(literals)))

    def _begun(self, literals: Sequence[str]) -> int:
        """Characters at the end that may begin a literal."""
        longest = min(max(map(len, literals), default=0) - 1, self.num_kept)
        for count in range(longest, 0, -1):
            end = self._text[-count:]
            if any(literal.startswith(end) for literal in literals):
                return count
        return 0


@cache
def _any_of(literals: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, literals)) or "(?!)")
