"""Calls of tools, which Ollama tells whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tokenrelay.service.api.assistant.arguments import arguments_object
from tokenrelay.service.api.assistant.deltas import Delta, ToolCallDelta
from tokenrelay.service.api.ollama.answer import OllamaCall, OllamaFunction


class Calls:
    """Gathers one call after the other. A call is whole when the next one begins, or the text ends."""

    def __init__(self) -> None:
        self._first: ToolCallDelta | None = None  # of the call that is being written
        self._arguments = ""

    def of(self, deltas: Sequence[Delta]) -> Iterator[OllamaCall]:
        """Those that became whole."""
        for delta in deltas:
            if isinstance(delta, ToolCallDelta):
                if delta.id:
                    yield from self.finish()
                    self._first = delta
                self._arguments += delta.arguments

    def finish(self) -> Iterator[OllamaCall]:
        """The last one, if there is one."""
        if self._first:
            arguments = arguments_object(self._arguments)
            function = OllamaFunction(index=self._first.index, name=self._first.name, arguments=arguments)
            yield OllamaCall(id=self._first.id, function=function)
        self._first, self._arguments = None, ""
