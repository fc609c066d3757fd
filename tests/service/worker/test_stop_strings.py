"""A stop string is found wherever the pieces are cut, and never shown."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tokenrelay.service.worker.stop_strings import StopStringMatcher

TEXT = st.text("ab. ", max_size=40)
STOPS = st.lists(st.text("ab. ", min_size=1, max_size=5), max_size=4)


def first_stop(text: str, stops: list[str]) -> int | None:
    return min((position for stop in stops if (position := text.find(stop)) >= 0), default=None)


@given(text=TEXT, stops=STOPS, cuts=st.lists(st.integers(0, 40)))
def test_any_cut_gives_the_text_before_the_stop(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopStringMatcher(stops)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    shown = ""
    stopped = False
    seen = ""
    for start, end in pairwise(bounds):
        seen += text[start:end]
        matched = matcher.append(text[start:end])
        shown += matched.text
        assert matched.stopped == (first_stop(seen, stops) is not None)
        if stopped := matched.stopped:
            break
    if not stopped:
        shown += matcher.flush()
    assert shown == seen[: first_stop(seen, stops)]


def test_only_what_may_become_a_stop_is_held_back() -> None:
    matcher = StopStringMatcher(["\n\nHuman"])
    assert matcher.append("Hello.\n") == ("Hello.", False)
    assert matcher.append("\nHu") == ("", False)
    assert matcher.append("ge") == ("\n\nHuge", False)
