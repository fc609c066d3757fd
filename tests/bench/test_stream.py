"""A stream is understood however the network cuts it up, and whoever wrote it."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tokenrelay.bench.client import Stream
from tokenrelay.bench.measured import Measured


def event(**chunk: Any) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def text(*words: str) -> bytes:
    return b"".join(event(choices=[{"text": word, "finish_reason": None}], usage=None) for word in words)


END = event(choices=[{"text": "", "finish_reason": "length"}]) + b"data: [DONE]\n\n"
USAGE = event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 5})


def seen(*parts: bytes) -> Measured:
    stream = Stream(measured := Measured(0.0))
    for part in parts:
        stream.feed(part)
    return measured


@given(st.sets(st.integers(0, 500)))
def test_wherever_it_is_cut(cuts: set[int]) -> None:
    whole = b": hello\n\nid: 1\n" + text("Grüße", " an", " alle") + USAGE + END
    edges = [0, *sorted(cut for cut in cuts if cut < len(whole)), len(whole)]
    measured = seen(*(whole[a:b] for a, b in pairwise(edges)))
    assert (len(measured.arrivals), measured.prompt_tokens, measured.output_tokens) == (3, 7, 5)
    assert measured.arrivals == sorted(measured.arrivals)


def test_lines_may_end_as_in_http() -> None:
    assert len(seen((text("a", "b") + END).replace(b"\n", b"\r\n")).arrivals) == 2


def test_the_space_behind_the_colon_is_optional() -> None:
    assert len(seen(text("a", "b").replace(b"data: ", b"data:")).arrivals) == 2


def test_the_last_token_may_come_with_the_end() -> None:
    assert len(seen(text("a"), event(choices=[{"text": "b", "finish_reason": "stop"}])).arrivals) == 2


def test_a_chunk_that_only_says_the_end_is_no_token() -> None:
    assert len(seen(text("a"), END).arrivals) == 1


def test_a_token_without_text_is_one() -> None:
    assert len(seen(text("a", "", "b")).arrivals) == 3


def test_without_usage_chunks_count_as_tokens() -> None:
    assert seen(text("a", "b", "c"), END).output_tokens == 3


def test_an_error_in_the_stream_is_kept() -> None:
    assert "out of luck" in seen(text("a"), event(error={"message": "out of luck"})).error
    assert "out of luck" in seen(event(error="out of luck")).error
