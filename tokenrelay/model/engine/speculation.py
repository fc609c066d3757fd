"""Drafts without a second model, which one forward pass then verifies.

A draft is a guess of the next tokens. The runner computes it along with the last token and draws at every position
as if the guesses before it were right; the longest run of right guesses, and one token more, is kept. Drawing is a
function of ids and position, so the text is that of plain decoding, whatever was guessed. (Leviathan et al. 2023)
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAM_SIZES = (3, 2)  # longest first: the longer the match, the better the guess
FIXED_COST = 3  # rows that cost as much as reading weights of 4 bits does: a step's price in rows, measured on 2 cores
LONGEST_PAUSE = 64  # tokens


class PromptLookup:
    """Guesses that what followed the last tokens before follows them again. (prompt lookup decoding, Saxena 2023)

    One per request. The length follows what was accepted; while too little is, it pauses, and tries again later.
    """

    __slots__ = ("_ends", "_length", "_max_drafts", "_num_indexed", "_pause", "_rate", "_resume_at")

    def __init__(self, max_drafts: int) -> None:
        self._max_drafts = max_drafts
        self._ends: dict[tuple[int, ...], int] = {}  # of each n-gram's last occurrence but the one at the end
        self._num_indexed = 0
        self._length = min(4, max_drafts)
        self._rate = 1.0  # moving average of accepted ÷ drafted
        self._pause = 4
        self._resume_at = 0  # number of tokens

    def propose(self, token_ids: Sequence[int], limit: int, num_running: int) -> list[int]:
        """At most ``limit`` guesses; fewer or none where drafts do not pay beside ``num_running`` requests.

        A step costs ``FIXED_COST + rows``, so d drafts of which a are right pay if a ÷ d > running ÷ (running + fixed).
        """
        if self._rate < num_running / (num_running + FIXED_COST) and len(token_ids) < self._resume_at:
            return []
        self._index(token_ids)
        for size in NGRAM_SIZES:
            end = self._ends.get(tuple(token_ids[-size:]))
            if end is not None:
                return _following(token_ids, end, min(limit, self._length))
        return []

    def observe(self, num_tokens: int, num_drafted: int, num_accepted: int) -> None:
        """Learn what came of the last drafts, behind which the request has ``num_tokens`` tokens."""
        self._rate += 0.25 * (num_accepted / num_drafted - self._rate)
        if num_accepted == num_drafted:
            self._length, self._pause = min(2 * self._length, self._max_drafts), 4
        else:
            self._length = num_accepted + 1
            self._pause = min(2 * self._pause, LONGEST_PAUSE) if num_accepted == 0 else 4
        self._resume_at = num_tokens + self._pause

    def _index(self, token_ids: Sequence[int]) -> None:
        for end in range(self._num_indexed + 1, len(token_ids)):
            for size in NGRAM_SIZES:
                if end >= size:
                    self._ends[tuple(token_ids[end - size : end])] = end
        self._num_indexed = max(self._num_indexed, len(token_ids) - 1)


def _following(token_ids: Sequence[int], start: int, count: int) -> list[int]:
    """What comes from ``start`` on; behind the end it goes round, so that a short cycle gives long drafts."""
    period = len(token_ids) - start
    return [token_ids[start + i % period] for i in range(count)]


def num_accepted(draft_token_ids: Sequence[int], drawn: Sequence[int]) -> int:
    """How many drafts are what was drawn in their place, from the first on."""
    for index, draft in enumerate(draft_token_ids):
        if drawn[index] != draft:
            return index
    return len(draft_token_ids)
