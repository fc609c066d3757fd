"""However a text is cut into pieces, it means the same; and reading it costs in proportion to its length."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.service.api.assistant.parsing import cut, new_parser, parsed
from tests.service.api.assistant.test_reasoning import WRITTEN as REASONED
from tests.service.api.assistant.test_tool_calls import NO_CALLS, WRITTEN
from tokenrelay.service.api.assistant.deltas import TextDelta
from tokenrelay.service.api.assistant.reader import Reader
from tokenrelay.service.api.assistant.tool_formats import FORMATS

SCRAPS = st.sampled_from(
    [
        *[text for _, text, _ in WRITTEN.values()],
        *[text for _, text in NO_CALLS.values()],
        *REASONED.values(),
        *["{", "}", "[", "]", '"', "\\", ",", ":", ";", " ", "\n", "<", "```", "(", ")", "a", "name", '"name": "x"'],
        *[opening for tool_format in FORMATS.values() for opening in tool_format.openings],
    ]
)
TEXTS = st.lists(SCRAPS | st.text(max_size=5), max_size=8).map("".join)
ALL_FORMATS = st.sampled_from(["", *FORMATS])
ALL_REASONING = st.sampled_from(["", *REASONED])


@settings(max_examples=100, deadline=None)
@given(TEXTS, ALL_FORMATS, ALL_REASONING, st.lists(st.integers(0, 10**6), max_size=12))
def test_pieces_mean_what_the_whole_means(
    text: str, tool_format: str, reasoning_format: str, places: Sequence[int]
) -> None:
    whole = parsed([text], new_parser(tool_format, reasoning_format))
    assert parsed(cut(text, places), new_parser(tool_format, reasoning_format)) == whole
    assert parsed(text, new_parser(tool_format, reasoning_format)) == whole


@settings(max_examples=50, deadline=None)
@given(TEXTS, st.sampled_from([*FORMATS]))
def test_what_is_no_call_is_all_there(text: str, tool_format: str) -> None:
    parser = new_parser(tool_format)
    deltas = parsed([text], parser)
    if not parser.has_tool_calls:
        assert deltas == [TextDelta(text)] * bool(text)


ADVERSARIAL = {
    "openings": ("hermes", "<tool_call>"),
    "other openings": ("granite", "<tool_call>"),
    "begun openings": ("hermes", "<tool_cal"),
    "brackets": ("hermes", "<tool_call>{"),
    "lists": ("mistral", "[TOOL_CALLS][{"),
    "quotes": ("llama3", '{"'),
    "backslashes": ("hermes", '<tool_call>{"name": "\\\\'),
    "calls": ("hermes", '<tool_call>{"name": "a", "arguments": {}}</tool_call>'),
    "arguments": ("hermes", '<tool_call>{"name": "a", "arguments": {"a": [{}, "\\"", []]'),
    "blanks": ("phi4", "functools \n"),
    "code": ("gemma", "```tool_code\nf(a='\\''"),
    "words": ("mistral", "[TOOL_CALLS]a"),
}
ADVERSARIAL_BEGINNINGS = {
    "one deep object": ("hermes", '<tool_call>{"name": "a", "arguments": ', '{"a": '),
    "one long object": ("hermes", '<tool_call>{"name": "a", "arguments": {"a": ', "[],"),
    "one long string": ("hermes", '<tool_call>{"name": "a", "arguments": {"a": "', "\\n"),
    "arguments without a name": ("hermes", '<tool_call>{"arguments": {"a": "', "x"),
    "one long list": ("mistral", "[TOOL_CALLS][", '{"name": "a", "arguments": {}}, '),
    "blanks at an end": ("hermes", "a", " "),
    "blanks in a call": ("hermes", "<tool_call>{", " "),
    "one long code": ("gemma", "```tool_code\nf(a=[", "1, "),
    "one open string": ("gemma", "```tool_code\nf(a='", "x"),
}
CASES = {name: (tool_format, "", unit) for name, (tool_format, unit) in ADVERSARIAL.items()} | ADVERSARIAL_BEGINNINGS


def events(pieces: Sequence[str], tool_format: str) -> int:
    """Lines of Python that run until the text is read."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += 1
        return trace

    parser = new_parser(tool_format, "think")
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for piece in pieces:
            parser.feed(piece)
        parser.finish()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("whole", [True, False])
def test_work_is_in_proportion_to_the_text(name: str, whole: bool) -> None:
    tool_format, beginning, unit = CASES[name]
    short, long = (beginning + unit * (size // len(unit)) for size in (1500, 6000))
    costs = [events([text] if whole else list(text), tool_format) for text in (short, long)]
    assert costs[1] < 5 * costs[0]


@pytest.mark.parametrize("name", CASES)
def test_little_is_kept_of_what_was_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that adding a piece to it costs little: the rest of the work is regular expressions over new text."""
    kept: list[int] = []
    feed = Reader.feed

    def watched(self: Reader, text: str) -> None:
        kept.append(self.num_kept)
        feed(self, text)

    monkeypatch.setattr(Reader, "feed", watched)
    tool_format, beginning, unit = CASES[name]
    parsed(beginning + unit * (3000 // len(unit)), new_parser(tool_format, "think"))
    assert max(kept) < 32


@pytest.mark.parametrize("name", CASES)
def test_a_long_text_at_once_is_read(name: str) -> None:
    """Under the suite's own limit of time: what is quadratic in a regular expression takes far longer."""
    tool_format, beginning, unit = CASES[name]
    assert parsed([beginning + unit * (10**5 // len(unit))], new_parser(tool_format))
