"""The pieces that an assistant's text consists of, in the order in which they come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """A piece of what was thought before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of call ``index``. ``id`` and ``name`` come once, with its first; ``arguments`` is a piece of JSON."""

    index: int
    id: str
    name: str
    arguments: str


Delta = TextDelta | ReasoningDelta | ToolCallDelta
