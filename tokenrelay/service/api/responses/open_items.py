"""The item that is being written at the end of a response's output, and the events it makes meanwhile."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

from tokenrelay.service.api.assistant.deltas import Delta, ReasoningDelta, TextDelta, ToolCallDelta
from tokenrelay.service.api.responses.events import (
    ArgumentsDeltaEvent,
    ArgumentsDoneEvent,
    ItemEvent,
    PartEvent,
    ReasoningDeltaEvent,
    ReasoningDoneEvent,
    StreamEvent,
    TextDeltaEvent,
    TextDoneEvent,
)
from tokenrelay.service.api.responses.objects import (
    FunctionCall,
    ItemStatus,
    OutputItem,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningText,
)
from tokenrelay.service.api.schemas.logprobs import ChatTokenLogprob

E = TypeVar("E", bound=StreamEvent)


class EventNumbers:
    """Makes events, each with the next number."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def event(self, kind: type[E], **fields: Any) -> E:
        return kind(sequence_number=next(self._numbers), **fields)


class OpenItem(ABC):
    """One item, at its place in the output. ``status`` of what it becomes is the caller's to say."""

    prefix: ClassVar[str]

    def __init__(self, numbers: EventNumbers, relay_id: str, index: int) -> None:
        self.id = f"{self.prefix}_{relay_id}_{index}"
        self._numbers = numbers
        self._index = index
        self._pieces: list[str] = []

    @abstractmethod
    def takes(self, delta: Delta) -> bool:
        """Whether it belongs here, and not to the next item."""

    @abstractmethod
    def item(self, status: ItemStatus) -> OutputItem:
        """As it is now."""

    @abstractmethod
    def more(self, delta: Delta, logprobs: Sequence[ChatTokenLogprob] = ()) -> list[StreamEvent]: ...

    def added(self) -> list[StreamEvent]:
        blank = self.item("in_progress").model_copy(update=self._blank())
        return [self._event(ItemEvent, type="response.output_item.added", item=blank)]

    def done(self, status: ItemStatus) -> list[StreamEvent]:
        return [self._event(ItemEvent, type="response.output_item.done", item=self.item(status))]

    def _blank(self) -> dict[str, Any]:
        """Of an item with parts: that there are none yet."""
        return {"content": []}

    @property
    def _text(self) -> str:
        return "".join(self._pieces)

    def _event(self, kind: type[E], **fields: Any) -> E:
        return self._numbers.event(kind, output_index=self._index, **fields)

    def _of_item(self, kind: type[E], **fields: Any) -> E:
        return self._event(kind, item_id=self.id, **fields)


class OpenMessage(OpenItem):
    """The answer: one part of text."""

    prefix = "msg"

    def __init__(self, numbers: EventNumbers, relay_id: str, index: int) -> None:
        super().__init__(numbers, relay_id, index)
        self._logprobs: list[ChatTokenLogprob] = []

    def takes(self, delta: Delta) -> bool:
        return isinstance(delta, TextDelta)

    def added(self) -> list[StreamEvent]:
        return [
            *super().added(),
            self._of_item(PartEvent, type="response.content_part.added", part=OutputText(text="")),
        ]

    def more(self, delta: Delta, logprobs: Sequence[ChatTokenLogprob] = ()) -> list[StreamEvent]:
        assert isinstance(delta, TextDelta)
        self._pieces.append(delta.text)
        self._logprobs += logprobs
        return [self._of_item(TextDeltaEvent, delta=delta.text, logprobs=list(logprobs))]

    def done(self, status: ItemStatus) -> list[StreamEvent]:
        return [
            self._of_item(TextDoneEvent, text=self._text, logprobs=self._logprobs),
            self._of_item(PartEvent, type="response.content_part.done", part=self._part),
            *super().done(status),
        ]

    def item(self, status: ItemStatus) -> OutputMessage:
        return OutputMessage(id=self.id, status=status, content=[self._part])

    @property
    def _part(self) -> OutputText:
        return OutputText(text=self._text, logprobs=list(self._logprobs))


class OpenReasoning(OpenItem):
    """What is thought before the answer."""

    prefix = "rs"

    def takes(self, delta: Delta) -> bool:
        return isinstance(delta, ReasoningDelta)

    def added(self) -> list[StreamEvent]:
        part = ReasoningText(text="")
        return [*super().added(), self._of_item(PartEvent, type="response.content_part.added", part=part)]

    def more(self, delta: Delta, logprobs: Sequence[ChatTokenLogprob] = ()) -> list[StreamEvent]:
        assert isinstance(delta, ReasoningDelta)
        self._pieces.append(delta.text)
        return [self._of_item(ReasoningDeltaEvent, delta=delta.text)]

    def done(self, status: ItemStatus) -> list[StreamEvent]:
        part = ReasoningText(text=self._text)
        return [
            self._of_item(ReasoningDoneEvent, text=self._text),
            self._of_item(PartEvent, type="response.content_part.done", part=part),
            *super().done(status),
        ]

    def item(self, status: ItemStatus) -> ReasoningItem:
        return ReasoningItem(id=self.id, status=status, content=[ReasoningText(text=self._text)])


class OpenCall(OpenItem):
    """A call of a function."""

    prefix = "fc"

    def __init__(self, numbers: EventNumbers, relay_id: str, index: int, first: ToolCallDelta) -> None:
        super().__init__(numbers, relay_id, index)
        self._call_id, self._name = first.id, first.name

    def takes(self, delta: Delta) -> bool:
        return isinstance(delta, ToolCallDelta) and not delta.id

    def more(self, delta: Delta, logprobs: Sequence[ChatTokenLogprob] = ()) -> list[StreamEvent]:
        assert isinstance(delta, ToolCallDelta)
        if not delta.arguments:
            return []
        self._pieces.append(delta.arguments)
        return [self._of_item(ArgumentsDeltaEvent, delta=delta.arguments)]

    def done(self, status: ItemStatus) -> list[StreamEvent]:
        arguments = self._of_item(ArgumentsDoneEvent, name=self._name, arguments=self._text)
        return [arguments, *super().done(status)]

    def item(self, status: ItemStatus) -> FunctionCall:
        return FunctionCall(id=self.id, call_id=self._call_id, name=self._name, arguments=self._text, status=status)

    def _blank(self) -> dict[str, Any]:
        return {}


def open_item(numbers: EventNumbers, relay_id: str, index: int, first: Delta) -> OpenItem:
    """The item that begins with this delta."""
    if isinstance(first, ToolCallDelta):
        return OpenCall(numbers, relay_id, index, first)
    kind = OpenMessage if isinstance(first, TextDelta) else OpenReasoning
    return kind(numbers, relay_id, index)
