"""Reasoning is split from the answer."""

from __future__ import annotations

import pytest

from tests.service.api.assistant.parsing import call, new_parser, parsed
from tokenrelay.service.api.assistant.deltas import Delta, ReasoningDelta, TextDelta
from tokenrelay.service.api.assistant.reasoning import detected_reasoning_format, opened_by

SPLIT: list[Delta] = [ReasoningDelta("Two\n\nand two."), TextDelta("Four.\n")]
WRITTEN = {
    "think": "<think>\nTwo\n\nand two.\n</think>\n\nFour.\n",
    "think:open": "\nTwo\n\nand two.\n</think>\n\nFour.\n",
    "mistral": "[THINK]Two\n\nand two.[/THINK]Four.\n",
    "reasoning": " <reasoning>Two\n\nand two.</reasoning>Four.\n",
    "harmony": (
        "<|channel|>analysis<|message|>Two\n\nand two.<|end|><|start|>assistant<|channel|>final<|message|>Four.\n"
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_both_are_told_apart(name: str) -> None:
    text = WRITTEN[name]
    assert parsed([text], new_parser("", name)) == parsed(text, new_parser("", name)) == SPLIT
    assert parsed([text], new_parser("", name, include_reasoning=False)) == SPLIT[1:]


@pytest.mark.parametrize("name", ["think", "mistral", "harmony"])
@pytest.mark.parametrize("text", ["Four.", " \nFour <think>", "<thi", "", "  "])
def test_without_reasoning_the_text_is_what_it_is(name: str, text: str) -> None:
    assert parsed(text, new_parser("", name)) == [TextDelta(text)] * bool(text)


def test_reasoning_that_breaks_off_is_reasoning() -> None:
    assert parsed("<think>Two and", new_parser("", "think")) == [ReasoningDelta("Two and")]
    assert parsed("Two and</thin", new_parser("", "think:open")) == [ReasoningDelta("Two and</thin")]


def test_an_opening_that_the_prompt_has_already_is_not_told() -> None:
    assert parsed("<think>Two</think>Four", new_parser("", "think:open")) == [ReasoningDelta("Two"), TextDelta("Four")]


def test_a_call_stands_in_the_answer() -> None:
    text = '<think>I call <tool_call>{"name": "a"}</think>\n\n<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    expected = [ReasoningDelta('I call <tool_call>{"name": "a"}'), call(0, "now", "{}")]
    assert parsed([text], new_parser("hermes", "think")) == parsed(text, new_parser("hermes", "think")) == expected


def test_the_template_tells_the_format() -> None:
    assert detected_reasoning_format(None) == detected_reasoning_format("<|im_start|>") == ""
    assert detected_reasoning_format("{{ '<think>' }}") == "think"
    assert detected_reasoning_format("{{ content.split('</think>')[-1] }}") == "think"
    assert detected_reasoning_format("[THINK]") == "mistral"
    assert detected_reasoning_format("<|channel|>analysis<|message|>") == "harmony"


def test_the_prompt_may_open_it() -> None:
    assert opened_by("<|assistant|><think>\n", "think") == "think:open"
    assert opened_by("<|assistant|><think>\n\n</think>\n\n", "think") == "think"
    assert opened_by("<think>", "") == ""
