"""A stop string is found wherever the pieces are cut."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from tokenrelay.service.worker.stop_strings import StopStringMatcher

TEXT = st.text("ab. ", max_size=40)
STOP = st.text("ab. ", min_size=1, max_size=5)
CUTS = st.lists(st.integers(0, 40))


def shown(matcher: StopStringMatcher, text: str, cuts: list[int]) -> tuple[str, str]:
    """What the matcher lets pass of ``text``, cut there; and what stopped it."""
    seen = ""
    for start, end in pairwise([0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]):
        matched = matcher.append(text[start:end])
        seen += matched.text
        if matched.stop:
            return seen, matched.stop
    return seen + matcher.flush(), ""


@given(text=TEXT, stop=STOP, cuts=CUTS)
def test_any_cut_gives_the_text_before_the_stop_or_with_it(text: str, stop: str, cuts: list[int]) -> None:
    found = text.find(stop)
    before, with_it = (text[:found], text[: found + len(stop)]) if found >= 0 else (text, text)
    assert shown(StopStringMatcher([stop]), text, cuts) == (before, stop * (found >= 0))
    assert shown(StopStringMatcher([stop], include=True), text, cuts) == (with_it, stop * (found >= 0))


@given(text=TEXT, stops=st.lists(STOP, max_size=4), cuts=CUTS)
@example(text="ab.", stops=["ab.", "b"], cuts=[])  # the shorter one is complete first, though it begins later
def test_of_several_stops_the_first_to_be_complete_counts(text: str, stops: list[str], cuts: list[int]) -> None:
    """So that it does not matter how much text comes at once."""
    for end in range(len(text) + 1):
        if complete := [stop for stop in stops if text[:end].endswith(stop)]:
            longest = max(complete, key=len)
            expected = text[: end - len(longest)], longest
            break
    else:
        expected = text, ""
    assert shown(StopStringMatcher(stops), text, cuts) == expected


def test_only_what_may_become_a_stop_is_held_back() -> None:
    matcher = StopStringMatcher(["\n\nHuman"])
    assert matcher.append("Hello.\n") == ("Hello.", "")
    assert matcher.append("\nHu") == ("", "")
    assert matcher.append("ge") == ("\n\nHuge", "")


def test_nothing_is_held_back_when_the_stop_is_part_of_the_text() -> None:
    matcher = StopStringMatcher(["\n\nHuman"], include=True)
    assert matcher.append("Hello.\n") == ("Hello.\n", "")
    assert matcher.append("\nHuman: Hi") == ("\nHuman", "\n\nHuman")


def test_text_that_may_not_stop_may_still_begin_a_stop() -> None:
    matcher = StopStringMatcher(["END"])
    assert matcher.append("END E", may_stop=False) == ("END ", "")
    assert matcher.append("ND") == ("", "END")
