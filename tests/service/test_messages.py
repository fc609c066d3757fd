"""What travels through the broker can be read by older and newer processes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tokenrelay.model.sampling_params import SamplingParams, TokenLogprobs
from tokenrelay.service.messages import (
    NEWEST,
    Event,
    MessageError,
    Submission,
    Usage,
    decode_event,
    decode_submission,
    encode,
)

EVENT = Event(
    choice=1,
    token_ids=[5, 6],
    text="ab",
    logprobs=[TokenLogprobs(5, -0.5, 1, ((5, -0.5), (7, -1.5))), TokenLogprobs(6, float("-inf"), 9)],
    prompt_logprobs=[None, TokenLogprobs(3, -2.5, 4)],
    mirostat_mu=7.5,
    finish_reason="stop",
    usage=Usage(prompt_tokens=2, completion_tokens=2),
)


def test_an_event_arrives_as_it_was_sent() -> None:
    assert decode_event(encode(EVENT)) == EVENT


def test_what_is_not_there_takes_no_room() -> None:
    """So a reader that does not know a field only meets it where somebody asked for it."""
    assert msgspec.msgpack.decode(encode(Event(token_ids=[5], text="a"))) == {"token_ids": [5], "text": "a"}


def test_a_newer_sender_s_fields_are_ignored_but_not_its_version() -> None:
    submission = Submission(request_id="r", prompt_token_ids=[1], params=SamplingParams(max_tokens=3))
    fields = msgspec.msgpack.decode(encode(submission))
    assert decode_submission(encode({**fields, "mood": "good"})) == submission
    with pytest.raises(MessageError, match=f"version {NEWEST + 1}"):
        decode_submission(encode({**fields, "version": NEWEST + 1}))


def test_a_request_costs_what_it_may_occupy() -> None:
    def cost(**params: Any) -> int:
        return Submission(request_id="r", prompt_token_ids=[1, 2], params=SamplingParams(max_tokens=10, **params)).cost

    assert (cost(), cost(n=3), cost(n=3, beam_width=4)) == (12, 32, 42)
