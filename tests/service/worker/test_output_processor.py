"""From ids to events, and back: a request begun elsewhere goes on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenrelay.model.engine.scheduler import StepOutput
from tokenrelay.model.sampling_params import FinishReason, SamplingParams
from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.model.weights import resolve
from tokenrelay.service.messages import Error, Event, Submission
from tokenrelay.service.queue import Claim
from tokenrelay.service.worker.output_processor import OutputProcessor, choice_seed, engine_id

TEXT = "Grüße aus 東京 🗼. Stop here, please."


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.from_source(resolve(str(smollm2_path)))


def make_claim(params: SamplingParams, log: list[Event] | None = None) -> Claim:
    return Claim(Submission(request_id="r", prompt_token_ids=[1, 2], params=params), 1, 1, log or [], 0.0)


def run(processor: OutputProcessor, ids: list[int], last: FinishReason | None = None) -> list[Event]:
    """Feed ids as the engine would, one step each; stops when the text does."""
    events: list[Event] = []
    for position, token_id in enumerate(ids):
        reason = last if position == len(ids) - 1 else None
        stopped = processor.process([StepOutput(engine_id("r", 0), token_id, reason)])
        for publication in processor.take_publications():
            events += publication.events
        if stopped:
            break
    return events


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events)


def test_text_is_complete_and_the_last_event_terminal(tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(tokenizer)
    processor.begin(make_claim(SamplingParams(max_tokens=99)))
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    events = run(processor, ids, FinishReason.LENGTH)
    assert text_of(events) == TEXT
    assert [event.terminal for event in events] == [False] * (len(events) - 1) + [True]
    assert events[-1].finish_reason == "length"
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == len(ids)


def test_a_stop_string_ends_the_choice_with_the_token_that_completed_it(tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(tokenizer)
    processor.begin(make_claim(SamplingParams(max_tokens=99, stop=("Stop here",))))
    events = run(processor, tokenizer.encode(TEXT, add_special_tokens=False))
    assert text_of(events) == TEXT[: TEXT.index("Stop here")]
    assert events[-1].finish_reason == "stop"
    assert events[-1].terminal


def test_a_resumed_request_continues_at_every_cut(tokenizer: Tokenizer) -> None:
    params = SamplingParams(max_tokens=99, stop=("please",))
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    undisturbed = OutputProcessor(tokenizer)
    undisturbed.begin(make_claim(params))
    expected = run(undisturbed, ids)
    for cut in range(1, len(expected)):
        resumed = OutputProcessor(tokenizer)
        (request,) = resumed.begin(make_claim(params, expected[:cut]))
        assert request.output_token_ids == ids[:cut]
        assert run(resumed, ids[cut:]) == expected[cut:]


def test_a_request_whose_worker_died_before_the_terminal_event_only_gets_that(tokenizer: Tokenizer) -> None:
    log = [Event(choice=0, token_ids=[5], finish_reason="stop"), Event(choice=1, token_ids=[6], finish_reason="length")]
    processor = OutputProcessor(tokenizer)
    assert processor.begin(make_claim(SamplingParams(max_tokens=9, n=2), log)) == []
    (publication,) = processor.take_publications()
    assert publication.index == 3
    assert [event.terminal for event in publication.events] == [True]


def test_cancelling_ends_every_open_choice(tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(tokenizer)
    processor.begin(make_claim(SamplingParams(max_tokens=9, n=2)))
    assert processor.cancel("r") == [engine_id("r", 0), engine_id("r", 1)]
    (publication,) = processor.take_publications()
    assert [event.finish_reason for event in publication.events] == ["cancelled", "cancelled"]
    assert publication.events[-1].terminal
    assert processor.cancel("r") == []


def test_choices_have_seeds_of_their_own_and_the_first_the_request_s() -> None:
    assert choice_seed(7, 0) == 7
    assert len({choice_seed(7, choice) for choice in range(16)}) == 16


def test_a_failed_request_ends_with_its_error_alone(tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(tokenizer)
    processor.begin(make_claim(SamplingParams(max_tokens=9, n=2)))
    error = Error(message="too long", code="context_length_exceeded")
    assert processor.fail("r", error) == [engine_id("r", 0), engine_id("r", 1)]
    (publication,) = processor.take_publications()
    assert publication.events == [Event(error=error)]
