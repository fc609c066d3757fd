"""Whatever pieces an answer comes in: foreign streams end once, make up the answer, and may be read on anywhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.service.api.anthropic.test_content import replayed
from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.service.api.anthropic.messages_format import MessagesFormat
from tokenrelay.service.api.lifecycle.choices import Finished, Output, Step
from tokenrelay.service.api.ollama.ollama_format import OllamaChatFormat
from tokenrelay.service.api.schemas.usage import CompletionUsage, PromptTokensDetails
from tokenrelay.service.api.served_model import ServedModel
from tokenrelay.service.terms import AnswerSpec

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
ANSWER = f"<think>Ask the tool.</think>Let me see. {CALL}\n{CALL}"
USAGE = CompletionUsage(
    prompt_tokens=5, completion_tokens=9, total_tokens=14, prompt_tokens_details=PromptTokensDetails(cached_tokens=0)
)
CUTS = st.lists(st.integers(0, len(ANSWER)), max_size=12)


def spec(route: Any) -> AnswerSpec:
    return AnswerSpec(
        route=route,
        model="m",
        created=1,
        num_prompt_tokens=5,
        tool_format="hermes",
        reasoning_format="think",
        extra={"max_tokens": 99, "model": "m:latest"},
    )


def steps(cuts: Sequence[int], finish_reason: str = "stop") -> list[Step]:
    """As a log cut there would give them; the end may come in an event of its own."""
    pieces = [ANSWER[start:end] for start, end in pairwise([0, *sorted(cuts), len(ANSWER)])]
    *others, last = [Output(0, piece) for piece in pieces]
    ends = Output(0, last.text, finish_reason=finish_reason)
    return [*(Step(i, output) for i, output in enumerate(others, 1)), Step(len(pieces), ends, USAGE)]


def finished() -> Finished:
    return Finished([Output(0, ANSWER, finish_reason="stop")], USAGE)


def message(tokenizer: Tokenizer) -> MessagesFormat:
    return MessagesFormat([spec("messages")], tokenizer, "msg_1")


def chat(tokenizer: Tokenizer) -> OllamaChatFormat:
    return OllamaChatFormat([spec("ollama_chat")], tokenizer, "ollama-1")


def told(wire: MessagesFormat | OllamaChatFormat, given: Sequence[Step], seen: int = 0) -> list[dict[str, Any]]:
    """The chunks behind the first ``seen`` steps, without a message's start."""
    for step in given[:seen]:
        wire.pass_over(step)
    return [chunk.model_dump(exclude_unset=True) for step in given[seen:] for chunk in wire.chunks(step)]


@settings(deadline=None, max_examples=50)
@given(cuts=CUTS)
def test_a_messages_events_make_up_the_message(served_model: ServedModel, cuts: list[int]) -> None:
    *blocks, end, stop = told(message(served_model.tokenizer), steps(cuts))
    whole = message(served_model.tokenizer).answer(finished()).model_dump()
    assert replayed(blocks) == whole["content"]
    assert [block["type"] for block in whole["content"]] == ["thinking", "text", "tool_use", "tool_use"]
    assert end["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert (whole["stop_reason"], whole["usage"]) == ("tool_use", end["usage"])
    assert stop == {"type": "message_stop"}
    assert "message_stop" not in [event["type"] for event in blocks]


@settings(deadline=None, max_examples=50)
@given(cuts=CUTS)
def test_a_chats_lines_make_up_the_answer(served_model: ServedModel, cuts: list[int]) -> None:
    *lines, end = told(chat(served_model.tokenizer), steps(cuts))
    whole = json.loads(chat(served_model.tokenizer).answer(finished()).model_dump_json(exclude_unset=True))["message"]
    joined = {
        "role": "assistant",
        "content": "".join(line["message"]["content"] for line in lines),
        "thinking": "".join(line["message"].get("thinking", "") for line in lines),
        "tool_calls": [call for line in lines for call in line["message"].get("tool_calls", ())],
    }
    assert joined == whole
    assert [call["function"]["arguments"] for call in whole["tool_calls"]] == [{"city": "Köln"}] * 2
    assert (end["done"], end["done_reason"], end["model"]) == (True, "stop", "m:latest")
    assert not any(line["done"] for line in lines)


@settings(deadline=None, max_examples=50)
@given(cuts=CUTS, seen=st.integers(0, 12))
def test_who_reads_on_gets_what_the_first_reader_got(served_model: ServedModel, cuts: list[int], seen: int) -> None:
    log = steps(cuts)
    seen = min(seen, len(log))
    for make in (message, chat):
        first = make(served_model.tokenizer)
        before = told(first, log[:seen])
        assert before + told(make(served_model.tokenizer), log, seen) == told(make(served_model.tokenizer), log)


def test_a_text_cut_short_says_why(served_model: ServedModel) -> None:
    *_, end, _ = told(message(served_model.tokenizer), steps([], "length"))
    assert end["delta"]["stop_reason"] == "model_context_window_exceeded"  # 9 tokens came, 99 were asked for
    [*_, line] = told(chat(served_model.tokenizer), steps([], "length"))
    assert line["done_reason"] == "length"
