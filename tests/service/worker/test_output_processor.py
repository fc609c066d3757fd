"""From ids to events, and back: a request begun elsewhere goes on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenrelay.model.engine.step import StepOutput
from tokenrelay.model.sampling_params import FinishReason, SamplingParams, TokenLogprobs
from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.model.weights import resolve
from tokenrelay.service.messages import Error, Event, Submission, Usage
from tokenrelay.service.queue import Claim
from tokenrelay.service.worker.output_processor import OutputProcessor, choice_seed, engine_id, prefix_cache_salt

TEXT = "Grüße aus 東京 🗼. Stop here, please."
PROMPT = [1, 2]


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.from_source(resolve(str(smollm2_path)))


class Pieces:
    """A vocabulary of bytes, behind the prompt's tokens, which have no text."""

    strips_leading_space = False
    special_ids = frozenset[int]()

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = [b"", *(b"" for _ in PROMPT), *pieces]
        self.ids = range(len(PROMPT) + 1, len(self._pieces))

    def token_bytes(self, token_id: int) -> bytes:
        return self._pieces[token_id]


def submission_of(params: SamplingParams, **fields: Any) -> Submission:
    return Submission(request_id="r", prompt_token_ids=PROMPT, params=params, **fields)


def make_claim(params: SamplingParams, log: list[Event] | None = None, **fields: Any) -> Claim:
    return Claim(submission_of(params, **fields), 1, 1, log or [], 0.0)


def step(*token_ids: int, choice: int = 0, finish: FinishReason | None = None, **fields: Any) -> StepOutput:
    """Log probabilities come along: minus a tenth of the id."""
    logprobs = tuple(TokenLogprobs(token_id, -token_id / 10, 1) for token_id in token_ids)
    return StepOutput(engine_id("r", choice), token_ids, finish, logprobs=logprobs, **fields)


def steps_of(token_ids: Sequence[int], sizes: Sequence[int], last: FinishReason | None = None) -> list[StepOutput]:
    """``token_ids``, so many in each step; one by one when ``sizes`` are used up."""
    bounds = [0]
    while bounds[-1] < len(token_ids):
        size = sizes[len(bounds) - 1] if len(bounds) <= len(sizes) else 1
        bounds.append(min(bounds[-1] + size, len(token_ids)))
    steps = [step(*token_ids[start:end], mirostat_mu=end / 2) for start, end in pairwise(bounds)]
    return [*steps[:-1], steps[-1]._replace(finish_reason=last)]


def run(processor: OutputProcessor, steps: Sequence[StepOutput], behind: int = 0) -> list[Event]:
    """Feed steps as the engine would; stops when the text does. ``behind`` so many events of the log."""
    events: list[Event] = []
    for output in steps:
        stopped = processor.process([output]).abort
        for publication in processor.take_publications():
            assert publication.index == behind + len(events) + 1
            events += publication.events
        if stopped:
            break
    return events


def begun(tokenizer: Any, params: SamplingParams, **fields: Any) -> OutputProcessor:
    processor = OutputProcessor(tokenizer)
    processor.begin(make_claim(params, **fields))
    return processor


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events)


def ids_of(events: list[Event]) -> list[int]:
    return [token_id for event in events for token_id in event.token_ids]


# --- text, and where it stops -----------------------------------------------------------------------------------------


def test_text_is_complete_and_the_last_event_terminal(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    events = run(begun(tokenizer, SamplingParams(max_tokens=99)), steps_of(ids, [], FinishReason.LENGTH))
    assert text_of(events) == TEXT
    assert [event.terminal for event in events] == [False] * (len(events) - 1) + [True]
    assert events[-1].finish_reason == "length"
    assert events[-1].usage == Usage(prompt_tokens=2, completion_tokens=len(ids))


def test_a_stop_string_ends_the_choice_with_the_token_that_completed_it(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    events = run(begun(tokenizer, SamplingParams(max_tokens=99, stop=("Stop here",))), steps_of(ids, []))
    assert text_of(events) == TEXT[: TEXT.index("Stop here")]
    assert (events[-1].finish_reason, events[-1].stop_string) == ("stop", "Stop here")
    assert events[-1].terminal


def test_tokens_behind_a_stop_string_are_as_if_never_computed(tokenizer: Tokenizer) -> None:
    """Speculation yields several tokens per step; the events are those of one token per step, put together."""
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    params = SamplingParams(max_tokens=99, stop=("Stop here",), logprobs=0)
    plain = run(begun(tokenizer, params), steps_of(ids, []))
    for size in range(2, len(ids) + 1):
        events = run(begun(tokenizer, params), steps_of(ids, [size] * len(ids), FinishReason.LENGTH))
        assert len(events) == -(-len(plain) // size)
        assert (text_of(events), ids_of(events)) == (text_of(plain), ids_of(plain))
        assert [t for event in events for t in event.logprobs] == [t for event in plain for t in event.logprobs]
        assert (events[-1].finish_reason, events[-1].usage) == ("stop", plain[-1].usage)


class Cut(NamedTuple):
    """A text as a model may emit it: in tokens of any bytes, any number of them per step."""

    text: str
    pieces: list[bytes]
    sizes: list[int]

    def num_characters(self, num_tokens: int) -> int:
        """Of the first tokens, without the character that is incomplete."""
        return len(b"".join(self.pieces[:num_tokens]).decode(errors="ignore"))


@st.composite
def cut_texts(draw: st.DrawFn) -> Cut:
    text = draw(st.text("aé東🗼", min_size=1, max_size=20))
    encoded = text.encode()
    bounds = [0, *sorted(draw(st.lists(st.integers(0, len(encoded)), max_size=30))), len(encoded)]
    pieces = [encoded[start:end] for start, end in pairwise(bounds)]
    return Cut(text, pieces, draw(st.lists(st.integers(1, 5), max_size=10)))


@given(
    cut=cut_texts(),
    stops=st.lists(st.text("aé東🗼", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
    min_tokens=st.integers(0, 30),
)
def test_stops_are_found_as_in_the_whole_text(cut: Cut, stops: list[str], include: bool, min_tokens: int) -> None:
    """Across tokens, characters and steps; not before ``min_tokens``, but a stop string may begin there."""
    num_tokens = len(cut.pieces)
    min_tokens = min(min_tokens, num_tokens)
    protected = cut.num_characters(max(0, min_tokens - 1))
    starts = [(cut.text.find(stop, max(0, protected + 1 - len(stop))), len(stop)) for stop in stops]
    end, start = min(((start + size, start) for start, size in starts if start >= 0), default=(len(cut.text),) * 2)
    stopped = any(start >= 0 for start, _ in starts)
    needed = next(n for n in range(num_tokens + 1) if cut.num_characters(n) >= end) if stopped else num_tokens

    params = SamplingParams(
        max_tokens=num_tokens, stop=tuple(stops), min_tokens=min_tokens, include_stop_str_in_output=include
    )
    tokens = Pieces(cut.pieces)
    events = run(begun(tokens, params), steps_of(tokens.ids, cut.sizes, FinishReason.LENGTH))
    assert text_of(events) == cut.text[: end if include else start]
    assert ids_of(events) == list(tokens.ids)[:needed]
    assert events[-1].finish_reason == ("stop" if stopped else "length")


def test_the_text_of_a_stop_token_is_shown_if_asked_for_and_not_special(tokenizer: Tokenizer) -> None:
    [period], [eos, *_] = tokenizer.encode(".", add_special_tokens=False), tokenizer.eos_token_ids
    spelling = tokenizer.token_bytes(eos).decode()
    for token_id, include, skip_special_tokens, text in (
        (period, False, True, ""),
        (period, True, True, "."),
        (eos, True, True, ""),
        (eos, True, False, spelling),
        (eos, False, False, ""),
    ):
        params = SamplingParams(max_tokens=9, include_stop_str_in_output=include)
        processor = begun(tokenizer, params, skip_special_tokens=skip_special_tokens)
        [event] = run(processor, [step(token_id, finish=FinishReason.STOP)])
        assert (event.text, event.token_ids, event.finish_reason) == (text, [token_id], "stop")


def test_special_tokens_in_the_middle_are_text_only_on_request(tokenizer: Tokenizer) -> None:
    [eos, *_] = tokenizer.eos_token_ids
    for skip, text in ((True, ""), (False, tokenizer.token_bytes(eos).decode())):
        processor = begun(tokenizer, SamplingParams(max_tokens=9, ignore_eos=True), skip_special_tokens=skip)
        assert text_of(run(processor, [step(eos)])) == text


# --- the prompt -------------------------------------------------------------------------------------------------------

OF_THE_PROMPT = (None, TokenLogprobs(2, -1.5, 4, ((7, -0.5),)))


def test_the_prompt_s_logprobs_are_asked_for_once_and_are_the_log_s_first_event(tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(tokenizer)
    requests = processor.begin(make_claim(SamplingParams(max_tokens=9, n=2, prompt_logprobs=1)))
    assert [request.params.prompt_logprobs for request in requests] == [1, None]
    processor.process([step(5, choice=1)])
    assert processor.take_publications() == []
    processor.process([step(6, choice=1), step(7, prompt_logprobs=OF_THE_PROMPT)])
    [publication] = processor.take_publications()
    assert [(event.choice, event.token_ids) for event in publication.events] == [(0, [7]), (1, [5]), (1, [6])]
    assert publication.events[0].prompt_logprobs == list(OF_THE_PROMPT)


def test_nobody_waits_for_the_logprobs_of_a_prompt_that_was_given_up(tokenizer: Tokenizer) -> None:
    processor = begun(tokenizer, SamplingParams(max_tokens=9, n=2, prompt_logprobs=1))
    processor.process([step(5, choice=1)])
    processor.cancel("r")
    [publication] = processor.take_publications()
    assert [event.finish_reason for event in publication.events] == [None, "cancelled", "cancelled"]


def test_the_token_of_a_request_for_the_prompt_only_is_dropped(tokenizer: Tokenizer) -> None:
    params = SamplingParams(max_tokens=1, prompt_logprobs=1, logprobs=1)
    processor = begun(tokenizer, params, prompt_only=True)
    [event] = run(processor, [step(5, finish=FinishReason.STOP, prompt_logprobs=OF_THE_PROMPT)])
    usage = Usage(prompt_tokens=2, completion_tokens=0)
    assert event == Event(prompt_logprobs=list(OF_THE_PROMPT), finish_reason="length", usage=usage)


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[], [3, 1, 4, 2, 2]])
@pytest.mark.parametrize("include", [False, True])
def test_a_resumed_request_continues_at_every_cut(tokenizer: Tokenizer, sizes: list[int], include: bool) -> None:
    params = SamplingParams(
        max_tokens=99, stop=("please",), min_tokens=5, logprobs=0, prompt_logprobs=0, include_stop_str_in_output=include
    )
    steps = steps_of(tokenizer.encode(TEXT, add_special_tokens=False), sizes)
    steps[0] = steps[0]._replace(prompt_logprobs=OF_THE_PROMPT)
    expected = run(begun(tokenizer, params), steps)
    assert text_of(expected) == TEXT[: TEXT.index("please") + len("please") * include]
    for cut in range(1, len(expected)):
        resumed = OutputProcessor(tokenizer)
        [request] = resumed.begin(make_claim(params, expected[:cut]))
        assert request.output_token_ids == ids_of(expected[:cut])
        assert request.mirostat_mu == expected[cut - 1].mirostat_mu
        assert not request.wants_prompt_logprobs
        assert run(resumed, steps[cut:], behind=cut) == expected[cut:]


def test_each_choice_gets_its_own_state_back(tokenizer: Tokenizer) -> None:
    log = [Event(token_ids=[5], mirostat_mu=4.5), Event(choice=1, token_ids=[6, 7], mirostat_mu=3.5)]
    first, second = OutputProcessor(tokenizer).begin(make_claim(SamplingParams(max_tokens=9, n=2), log))
    assert (first.output_token_ids, first.mirostat_mu) == ([5], 4.5)
    assert (second.output_token_ids, second.mirostat_mu) == ([6, 7], 3.5)


def test_a_request_whose_worker_died_before_the_terminal_event_only_gets_that(tokenizer: Tokenizer) -> None:
    log = [Event(choice=0, token_ids=[5], finish_reason="stop"), Event(choice=1, token_ids=[6], finish_reason="length")]
    processor = OutputProcessor(tokenizer)
    assert processor.begin(make_claim(SamplingParams(max_tokens=9, n=2), log)) == []
    (publication,) = processor.take_publications()
    assert publication.index == 3
    assert [event.terminal for event in publication.events] == [True]


# --- the rest of a request's life -------------------------------------------------------------------------------------


def test_the_engine_is_told_priority_and_salt(tokenizer: Tokenizer) -> None:
    claim = make_claim(SamplingParams(max_tokens=9), priority=-3, cache_salt="mine")
    [request] = OutputProcessor(tokenizer).begin(claim)
    [unsalted] = OutputProcessor(tokenizer).begin(make_claim(SamplingParams(max_tokens=9)))
    assert request.priority == -3
    assert request.block_hashes(1, 2) != unsalted.block_hashes(1, 2)


@given(*[st.tuples(st.text("1:a"), st.text("1:a"))] * 2)
def test_no_salt_reaches_into_another_tenant_s_cache(one: tuple[str, str], two: tuple[str, str]) -> None:
    params = SamplingParams(max_tokens=1)
    salts = [prefix_cache_salt(submission_of(params, tenant=tenant, cache_salt=salt)) for tenant, salt in (one, two)]
    assert (salts[0] == salts[1]) == (one == two)


def test_cancelling_ends_every_open_choice(tokenizer: Tokenizer) -> None:
    processor = begun(tokenizer, SamplingParams(max_tokens=9, n=2))
    assert processor.cancel("r") == [engine_id("r", 0), engine_id("r", 1)]
    (publication,) = processor.take_publications()
    assert [event.finish_reason for event in publication.events] == ["cancelled", "cancelled"]
    assert publication.events[-1].terminal
    assert processor.cancel("r") == []


def test_choices_have_seeds_of_their_own_and_the_first_the_request_s() -> None:
    assert choice_seed(7, 0) == 7
    assert len({choice_seed(7, choice) for choice in range(16)}) == 16


def test_a_failed_request_ends_with_its_error_alone(tokenizer: Tokenizer) -> None:
    processor = begun(tokenizer, SamplingParams(max_tokens=9, n=2))
    error = Error(message="too long", code="context_length_exceeded")
    assert processor.fail("r", error) == [engine_id("r", 0), engine_id("r", 1)]
    (publication,) = processor.take_publications()
    assert publication.events == [Event(error=error)]
