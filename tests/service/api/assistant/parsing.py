"""Texts through the parser, in one piece or in many."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from tokenrelay.service.api.assistant.deltas import Delta, ReasoningDelta, TextDelta, ToolCallDelta
from tokenrelay.service.api.assistant.parser import AssistantParser
from tokenrelay.service.terms import AnswerSpec


def new_parser(tool_format: str = "", reasoning_format: str = "", **fields: Any) -> AssistantParser:
    spec = AnswerSpec(
        route="chat",
        model="m",
        created=0,
        num_prompt_tokens=1,
        tool_format=tool_format,
        reasoning_format=reasoning_format,
        **fields,
    )
    return AssistantParser(spec, "r", 0)


def parsed(pieces: Iterable[str], parser: AssistantParser) -> list[Delta]:
    """All deltas, adjacent ones of the same joined."""
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    return joined([*deltas, *parser.finish()])


def joined(deltas: Iterable[Delta]) -> list[Delta]:
    found: list[Delta] = []
    for delta in deltas:
        match found[-1:], delta:
            case [TextDelta(before)], TextDelta(text):
                found[-1] = TextDelta(before + text)
            case [ReasoningDelta(before)], ReasoningDelta(text):
                found[-1] = ReasoningDelta(before + text)
            case [ToolCallDelta(index, id, name, before)], ToolCallDelta(same, "", "", text) if index == same:
                found[-1] = ToolCallDelta(index, id, name, before + text)
            case _:
                found.append(delta)
    return found


def call(index: int, name: str, arguments: str, id: str | None = None) -> ToolCallDelta:
    return ToolCallDelta(index, id or f"call_r_0_{index}", name, arguments)


def cut(text: str, places: Iterable[int]) -> list[str]:
    """The text, cut at these places."""
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(bounds)]
