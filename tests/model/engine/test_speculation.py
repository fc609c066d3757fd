"""Guessing what comes next, and stopping to guess where it does not pay."""

from __future__ import annotations

import random

from tokenrelay.model.engine.speculation import LONGEST_PAUSE, PromptLookup, num_accepted


def test_what_followed_the_last_tokens_before_is_the_guess() -> None:
    assert PromptLookup(8).propose([1, 2, 3, 4, 5, 6, 7, 1, 2, 3], limit=8, num_running=1) == [4, 5, 6, 7]


def test_the_longest_match_wins_and_then_the_latest() -> None:
    assert PromptLookup(8).propose([1, 2, 3, 50, 9, 2, 3, 60, 9, 1, 2, 3], 1, 1) == [50]
    assert PromptLookup(8).propose([2, 3, 50, 9, 2, 3, 60, 9, 2, 3], 1, 1) == [60]


def test_a_cycle_goes_on() -> None:
    assert PromptLookup(8).propose([7, 1, 2, 1, 2, 1, 2], 4, 1) == [1, 2, 1, 2]
    assert PromptLookup(8).propose([5, 5, 5, 5], 3, 1) == [5, 5, 5]


def test_nothing_known_is_no_guess() -> None:
    assert PromptLookup(8).propose([1, 2, 3, 4], 8, 1) == []
    assert PromptLookup(8).propose([1], 8, 1) == []


def test_right_guesses_get_longer_and_wrong_ones_shorter() -> None:
    lookup = PromptLookup(16)
    cycle = [1, 2, 3] * 30
    lengths = []
    for accepted_all in (True, True, True, False):
        drafts = lookup.propose(cycle, 99, 1)
        lengths.append(len(drafts))
        lookup.observe(len(cycle), len(drafts), len(drafts) if accepted_all else 2)
    assert lengths == [4, 8, 16, 16]
    assert len(lookup.propose(cycle, 99, 1)) == 3


def test_guesses_that_fail_stop_and_are_tried_again_ever_more_rarely() -> None:
    lookup = PromptLookup(8)
    token_ids = [1, 2, 3]
    rng = random.Random(0)
    tries = []
    for _ in range(1000):
        token_ids.append(rng.choice([1, 2]))
        if drafts := lookup.propose(token_ids, 8, 1):
            tries.append(len(token_ids))
            lookup.observe(len(token_ids), len(drafts), 0)
    assert len(tries) < 40
    assert LONGEST_PAUSE <= tries[-1] - tries[-2] <= 2 * LONGEST_PAUSE


def test_a_full_batch_asks_for_better_guesses() -> None:
    lookup = PromptLookup(8)
    cycle = [1, 2, 3] * 10
    for _ in range(20):
        lookup.observe(len(cycle), 4, 2)  # half of them are right
    assert lookup.propose(cycle, 8, num_running=2)
    assert not lookup.propose(cycle, 8, num_running=40)


def test_drafts_are_right_up_to_the_first_wrong_one() -> None:
    assert num_accepted([1, 2, 3], [1, 2, 9, 3]) == 2
    assert num_accepted([1, 2], [1, 2, 3]) == 2
    assert num_accepted([], [5]) == 0
