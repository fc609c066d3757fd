"""Blocks of a stream and blocks of a whole answer are the same."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tokenrelay.service.api.anthropic.content import BlockEvents, content_blocks
from tokenrelay.service.api.assistant.deltas import Delta, ReasoningDelta, TextDelta, ToolCallDelta

TEXTS = st.text("ab{}", min_size=1, max_size=3)
PIECES = st.lists(st.text('{"a":1}', max_size=3), max_size=3)


@st.composite
def calls(draw: st.DrawFn) -> list[Delta]:
    """One call: its id and name, then its arguments in pieces."""
    name = draw(TEXTS)
    return [ToolCallDelta(0, "call", name, ""), *(ToolCallDelta(0, "", "", piece) for piece in draw(PIECES))]


DELTAS = st.lists(TEXTS.map(TextDelta).map(lambda d: [d]) | TEXTS.map(ReasoningDelta).map(lambda d: [d]) | calls()).map(
    lambda groups: [delta for group in groups for delta in group]
)


@given(deltas=DELTAS, cuts=st.lists(st.integers(0, 20)))
def test_the_events_of_any_stream_make_up_the_whole_answer(deltas: list[Delta], cuts: list[int]) -> None:
    events = streamed(deltas, cuts)
    assert replayed(events) == [block.model_dump() for block in content_blocks(deltas)]


@given(deltas=DELTAS)
def test_blocks_do_not_overlap_and_their_numbers_count_up(deltas: list[Delta]) -> None:
    events = streamed(deltas, [])
    assert [e["index"] for e in events if e["type"] == "content_block_start"] == list(
        range(len(content_blocks(deltas)))
    )
    open_block = None
    for event in events:
        if event["type"] == "content_block_start":
            assert open_block is None
            open_block = event["index"]
        assert event["index"] == open_block
        if event["type"] == "content_block_stop":
            open_block = None
    assert open_block is None


def test_arguments_that_are_no_object_are_kept_as_text() -> None:
    [block] = content_blocks([ToolCallDelta(0, "c", "f", '{"city": "Kö')])
    assert block.model_dump()["input"] == {"INVALID_JSON": '{"city": "Kö'}


def streamed(deltas: list[Delta], cuts: list[int]) -> list[dict[str, Any]]:
    """The events, whatever steps the deltas come in."""
    blocks, events, start = BlockEvents(), [], 0
    for end in [*sorted(cut for cut in cuts if cut < len(deltas)), len(deltas)]:
        events += list(blocks.of(deltas[start:end]))
        start = end
    return [event.model_dump() for event in [*events, *blocks.close()]]


def replayed(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a client makes of events."""
    blocks: list[dict[str, Any]] = []
    arguments = ""
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append(dict(event["content_block"]))
            arguments = ""
        elif event["type"] == "content_block_delta" and event["delta"]["type"] == "input_json_delta":
            arguments += event["delta"]["partial_json"]
        elif event["type"] == "content_block_delta":
            kind = blocks[-1]["type"]
            blocks[-1][kind] += event["delta"][kind]
        elif blocks[-1]["type"] == "tool_use":
            blocks[-1]["input"] = input_of(arguments)
    return blocks


def input_of(arguments: str) -> Any:
    try:
        parsed = json.loads(arguments or "{}")
    except ValueError:
        parsed = None
    return parsed if isinstance(parsed, dict) else {"INVALID_JSON": arguments}
