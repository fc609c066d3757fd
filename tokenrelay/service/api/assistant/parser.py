"""From the text of one choice to deltas, as it comes."""

from __future__ import annotations

from tokenrelay.service.api.assistant.deltas import Delta, ReasoningDelta, TextDelta
from tokenrelay.service.api.assistant.reasoning import reasoning_parser
from tokenrelay.service.api.assistant.tool_call_parser import ToolCallParser
from tokenrelay.service.api.assistant.tool_formats import FORMATS
from tokenrelay.service.terms import AnswerSpec


class AssistantParser:
    """Of one choice. Its state comes only from what it was fed, so any process can render any request's log."""

    def __init__(self, spec: AnswerSpec, relay_id: str, choice: int) -> None:
        stem = f"call_{relay_id}_{choice}_"
        self._tells_reasoning = spec.include_reasoning
        self._reasoning = reasoning_parser(spec.reasoning_format) if spec.reasoning_format else None
        self._tools = (
            ToolCallParser(FORMATS[spec.tool_format], stem, parallel=spec.parallel_tool_calls)
            if spec.tool_format
            else None
        )

    def feed(self, text: str) -> list[Delta]:
        """What the next piece of text makes certain."""
        if self._reasoning:
            return self._with_tool_calls(self._reasoning.feed(text))
        return self._with_tool_calls([TextDelta(text)]) if text else []

    def finish(self) -> list[Delta]:
        """The text is complete: what was held back."""
        deltas = self._with_tool_calls(self._reasoning.finish()) if self._reasoning else []
        return deltas + self._tools.finish() if self._tools else deltas

    @property
    def has_tool_calls(self) -> bool:
        """Whether a call has been told; then the finish reason ``stop`` is told as ``tool_calls``."""
        return self._tools is not None and self._tools.num_calls > 0

    def _with_tool_calls(self, deltas: list[Delta]) -> list[Delta]:
        """Calls stand in the answer, not in the reasoning."""
        if self._tools is None and self._tells_reasoning:
            return deltas
        parsed: list[Delta] = []
        for delta in deltas:
            if isinstance(delta, TextDelta) and self._tools:
                parsed += self._tools.feed(delta.text)
            elif self._tells_reasoning or not isinstance(delta, ReasoningDelta):
                parsed.append(delta)
        return parsed
