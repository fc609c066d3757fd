"""What is left of a tenant's limits, and the refusal of what they do not allow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tokenrelay.service.errors import RateLimited
from tokenrelay.service.tenants import Limits


class Allowance(NamedTuple):
    """As of one request. The milliseconds are those until all of a limit is there again."""

    limits: Limits
    requests_left: int
    requests_reset_ms: int
    tokens_left: int
    tokens_reset_ms: int

    @classmethod
    def read(cls, limits: Limits, left: Sequence[int]) -> Allowance:
        """Of what ``tenants.lua`` tells."""
        return cls(limits, *left)

    @property
    def headers(self) -> dict[str, str]:
        """Under OpenAI's names; of limits that there are."""
        headers: dict[str, str] = {}
        if self.limits.requests_per_minute:
            counts = (self.limits.requests_per_minute, self.requests_left, self.requests_reset_ms)
            headers |= _headers("requests", *counts)
        if self.limits.tokens_per_minute:
            headers |= _headers("tokens", self.limits.tokens_per_minute, self.tokens_left, self.tokens_reset_ms)
        return headers

    def refusal(self, reason: bytes, wait_ms: int, cost: int) -> RateLimited:
        """Of a request that might take ``cost`` tokens."""
        message = {
            b"requests": f"You may send {self.limits.requests_per_minute} requests a minute",
            b"tokens": f"The request might take {cost} tokens with its answer, and {self.tokens_left} of your "
            f"{self.limits.tokens_per_minute} a minute are left",
            b"concurrent": f"You may have {self.limits.concurrent_requests} requests at a time, and have them",
        }[reason]
        error = RateLimited(f"{message}; try again in {wait_ms / 1000:g} s.", retry_after=wait_ms / 1000)
        error.headers = self.headers
        return error


def _headers(what: str, limit: int, left: int, reset_ms: int) -> dict[str, str]:
    prefix = "x-ratelimit"
    return {
        f"{prefix}-limit-{what}": str(limit),
        f"{prefix}-remaining-{what}": str(left),
        f"{prefix}-reset-{what}": _duration(reset_ms),
    }


def _duration(ms: int) -> str:
    """As OpenAI writes them: ``20ms``, ``6.5s``, ``1m0s``."""
    if ms < 1000:
        return f"{ms}ms"
    minutes, seconds = divmod(ms / 1000, 60)
    return f"{minutes:.0f}m{seconds:g}s" if minutes else f"{seconds:g}s"
