"""From an assistant's deltas to content blocks: whole ones, or the events of one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from tokenrelay.service.api.anthropic.message import (
    ContentBlock,
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    InputJsonDeltaPart,
    MessageEvent,
    TextBlock,
    TextDeltaPart,
    ThinkingBlock,
    ThinkingDeltaPart,
    ToolUseBlock,
)
from tokenrelay.service.api.assistant.deltas import Delta, ReasoningDelta, TextDelta, ToolCallDelta


class BlockEvents:
    """Knows which block is open: at most one, and their numbers count up."""

    def __init__(self) -> None:
        self._last: Delta | None = None  # of the open block
        self._index = -1

    def of(self, deltas: Sequence[Delta]) -> Iterator[MessageEvent]:
        for delta in deltas:
            if _begins_block(delta, self._last):
                yield from self.close()
                self._index += 1
                yield ContentBlockStart(type="content_block_start", index=self._index, content_block=_empty(delta))
            self._last = delta
            if part := _part(delta):
                yield ContentBlockDelta(type="content_block_delta", index=self._index, delta=part)

    def close(self) -> Iterator[MessageEvent]:
        """The end of the open block, if one is."""
        if self._last is not None:
            self._last = None
            yield ContentBlockStop(type="content_block_stop", index=self._index)


def content_blocks(deltas: Sequence[Delta]) -> list[ContentBlock]:
    """The same blocks, whole."""
    groups: list[list[Delta]] = []
    for previous, delta in zip([None, *deltas], deltas, strict=False):
        if _begins_block(delta, previous):
            groups.append([])
        groups[-1].append(delta)
    return [_whole(group) for group in groups]


def _begins_block(delta: Delta, previous: Delta | None) -> bool:
    return type(delta) is not type(previous) or (isinstance(delta, ToolCallDelta) and bool(delta.id))


def _empty(delta: Delta) -> ContentBlock:
    if isinstance(delta, TextDelta):
        return TextBlock(type="text", text="")
    if isinstance(delta, ReasoningDelta):
        return ThinkingBlock(type="thinking", thinking="", signature="")
    return ToolUseBlock(type="tool_use", id=delta.id, name=delta.name, input={})


def _part(delta: Delta) -> TextDeltaPart | ThinkingDeltaPart | InputJsonDeltaPart | None:
    if isinstance(delta, TextDelta):
        return TextDeltaPart(type="text_delta", text=delta.text)
    if isinstance(delta, ReasoningDelta):
        return ThinkingDeltaPart(type="thinking_delta", thinking=delta.text)
    return InputJsonDeltaPart(type="input_json_delta", partial_json=delta.arguments) if delta.arguments else None


def _whole(group: Sequence[Delta]) -> ContentBlock:
    text = "".join(delta.arguments if isinstance(delta, ToolCallDelta) else delta.text for delta in group)
    block = _empty(group[0])
    if isinstance(block, TextBlock):
        return TextBlock(type="text", text=text)
    if isinstance(block, ThinkingBlock):
        return ThinkingBlock(type="thinking", thinking=text, signature="")
    return ToolUseBlock(type="tool_use", id=block.id, name=block.name, input=_input(text))


def _input(arguments: str) -> dict[str, Any]:
    """What is not a JSON object, as when max_tokens cut it off, is kept as text, under Anthropic's name for that."""
    try:
        parsed = json.loads(arguments or "{}")
    except ValueError:
        parsed = None
    return parsed if isinstance(parsed, dict) else {"INVALID_JSON": arguments}
