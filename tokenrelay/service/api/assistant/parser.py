"""From the text of one choice to deltas, as it comes."""

from __future__ import annotations

from tokenrelay.service.api.assistant.deltas import Delta, TextDelta
from tokenrelay.service.terms import AnswerSpec


class AssistantParser:
    """Of one choice. Its state comes only from what it was fed, so any process can render any request's log."""

    def __init__(self, spec: AnswerSpec, relay_id: str, choice: int) -> None:
        self._spec = spec
        self._id_stem = f"call_{relay_id}_{choice}_"

    def feed(self, text: str) -> list[Delta]:
        """What the next piece of text makes certain."""
        return [TextDelta(text)] if text else []

    def finish(self) -> list[Delta]:
        """The text is complete: what was held back."""
        return []

    @property
    def has_tool_calls(self) -> bool:
        """Whether a call has been told; then the finish reason ``stop`` is told as ``tool_calls``."""
        return False
