"""The stream of a response: its numbered events on the wire, from any number on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.service.api.lifecycle.choices import Finished, Step
from tokenrelay.service.api.responses.event_sequence import EventSequence
from tokenrelay.service.api.responses.events import StreamEvent
from tokenrelay.service.api.responses.objects import Response
from tokenrelay.service.api.streaming.sse import RETRY, NamedEvents
from tokenrelay.service.errors import ServiceError
from tokenrelay.service.terms import AnswerSpec


class ResponseFormat(NamedEvents):
    """Of one response, which has one prompt and one choice. The events up to ``starting_after`` are left out."""

    def __init__(
        self, specs: Sequence[AnswerSpec], tokenizer: Tokenizer, answer_id: str, starting_after: int = -1
    ) -> None:
        self._starting_after = starting_after
        self._events = EventSequence(specs[0], tokenizer, answer_id)
        self.preamble = RETRY + b"".join(map(self._unplaced, self._events.opening()))

    def opening(self, first: Step) -> list[StreamEvent]:
        """Was told before: a client learns the response's id while it waits in the queue."""
        return []

    def chunks(self, step: Step) -> list[StreamEvent]:
        return self._events.step(step)

    def pass_over(self, step: Step) -> None:
        self._events.step(step)

    def frame(self, chunk: Any, at: str) -> bytes:
        return super().frame(chunk, at) if chunk.sequence_number > self._starting_after else b""

    def failure(self, error: ServiceError) -> bytes:
        return b"".join(map(self._unplaced, self._events.fail(error)))

    def interim(self, name: str | None, **fields: Any) -> bytes:
        """The protocol has no words for it."""
        return b""

    def answer(self, finished: Finished) -> Response:
        self._events.step(Step(1, finished.outputs[0], finished.usage))
        return self._events.response

    def _unplaced(self, event: StreamEvent) -> bytes:
        """Not behind any event of the log."""
        return self.unplaced(event, event.type) if event.sequence_number > self._starting_after else b""
