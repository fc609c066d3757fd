"""What the parsers of reasoning and of tool calls have in common: text in, deltas out, both in pieces."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from tokenrelay.service.api.assistant.deltas import Delta, ReasoningDelta, TextDelta, ToolCallDelta
from tokenrelay.service.api.assistant.reader import Parsing, Reader


class Stage:
    """One pass over a text. How the text is cut into pieces changes nothing about the deltas, joined."""

    def __init__(self) -> None:
        self.reader = Reader()
        self._deltas: list[Delta] = []
        self._parsing = self.document()

    def document(self) -> Parsing[None]:
        """Reads all of the text, and tells."""
        raise NotImplementedError

    def feed(self, text: str) -> list[Delta]:
        self.reader.feed(text)
        return self._go_on()

    def finish(self) -> list[Delta]:
        self.reader.ended = True
        return self._go_on()

    def tell(self, delta: Delta) -> None:
        """The next piece."""
        self._deltas.append(delta)

    def pause(self) -> None:
        """Before more text is waited for: what can be told already."""

    def _go_on(self) -> list[Delta]:
        next(self._parsing, None)
        self.pause()
        deltas, self._deltas = self._deltas, []
        return merged(deltas)


def merged(deltas: Iterable[Delta]) -> list[Delta]:
    """Adjacent pieces of the same are one; but a call's id and name come alone."""
    return [_joined(key, list(pieces)) for key, pieces in groupby(deltas, _whose)]


def _whose(delta: Delta) -> tuple[type[Delta], int, str]:
    return (type(delta), delta.index, delta.id) if isinstance(delta, ToolCallDelta) else (type(delta), 0, "")


def _joined(key: tuple[type[Delta], int, str], pieces: list[Delta]) -> Delta:
    if len(pieces) == 1:
        return pieces[0]
    if key[0] is ToolCallDelta:
        return ToolCallDelta(key[1], "", "", "".join(p.arguments for p in pieces if isinstance(p, ToolCallDelta)))
    text = "".join(p.text for p in pieces if not isinstance(p, ToolCallDelta))
    return TextDelta(text) if key[0] is TextDelta else ReasoningDelta(text)
