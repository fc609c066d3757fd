"""How much waits, how fast it drains, and whom that refuses. (backpressure instead of a queue that only grows)

A request counts as the tokens it may occupy. How fast the queue drains is measured in the same unit, over the time in
which requests waited: so the estimates hold whatever share of their ``max_tokens`` requests really use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from redis.asyncio import Redis

from tokenrelay.service.errors import DeadlineUnreachable, QueueFull, RateLimited, ServiceError
from tokenrelay.service.keys import LIVE_TTL, Keys
from tokenrelay.service.lua import Scripts
from tokenrelay.service.messages import encode
from tokenrelay.service.settings import Settings
from tokenrelay.service.tenants import Tenant

_REASONS = {
    b"tenant_requests": (RateLimited, "Too many of your requests are waiting already"),
    b"tenant_tokens": (RateLimited, "Your waiting requests ask for too many tokens already"),
    b"requests": (QueueFull, "Too many requests are waiting already"),
    b"tokens": (QueueFull, "The waiting requests ask for too many tokens already"),
    b"bytes": (QueueFull, "The waiting requests take too much memory already"),
    b"deadline": (DeadlineUnreachable, "The request could not be started before its deadline"),
}


class Load(NamedTuple):
    """What waits, and how fast it drains."""

    num_requests: int
    num_tokens: int
    num_bytes: int
    tokens_per_second: float

    @property
    def estimated_wait(self) -> float:
        """Seconds until all that waits now is worked on; infinite at a standstill."""
        return _seconds_to_drain(self.num_tokens, self.tokens_per_second)


class Place(NamedTuple):
    """Where a request waits: requests before it, and seconds until it is worked on; infinite at a standstill."""

    position: int
    estimated_wait: float


@dataclass(frozen=True, slots=True)
class AtWork:
    """How far a worker is with a request's prompt: tokens, of these found in the cache, and seconds since the claim.

    Time alone is no news: it makes no difference in comparisons.
    """

    num_computed_prompt_tokens: int
    num_cached_prompt_tokens: int
    seconds: float = field(compare=False)


Whereabouts = Place | AtWork


class QueueLoad:
    """The load of one model's queue, as its limits see it. Raises BrokerUnavailable when the broker is."""

    def __init__(self, redis: Redis, keys: Keys, settings: Settings) -> None:
        self._scripts = Scripts(redis, keys)
        self._keys = [keys.waiting]
        self._was_full = False
        self.limits = _encoded_limits(settings)

    async def read(self) -> Load:
        load, _ = await self._look([])
        return load

    async def whereabouts(self, request_ids: Sequence[str]) -> dict[str, Whereabouts]:
        """Of those that wait or are worked on."""
        load, replies = await self._look(request_ids)
        return {name: _whereabouts(load, reply) for name, reply in zip(request_ids, replies, strict=True) if reply}

    async def require_room(self, tenant: Tenant) -> None:
        """Raises what ``Queue.submit`` would for any request, however small: before work is done for one.

        Costs nothing while the queue accepts; from a refusal on, the broker is asked.
        """
        if self._was_full:
            reply = await self._scripts.call("look", self._keys, tenant.name, self.limits, str(tenant.weight))
            if reply:
                raise self.refusal(reply)
            self._was_full = False

    def refusal(self, reply: Sequence[Any]) -> ServiceError:
        """The error of what ``refusal`` in ``library.lua`` returned."""
        self._was_full = True
        _, limit, num_waiting, tokens, rate = reply
        kind, reason = _REASONS[limit]
        seconds = _seconds_to_drain(int(tokens), float(rate))
        return kind(f"{reason} ({num_waiting} in the queue); {_advice(seconds)}.", retry_after=seconds)

    async def _look(self, request_ids: Sequence[str]) -> tuple[Load, list[list[int]]]:
        reply = await self._scripts.call("load", self._keys, encode(list(request_ids)))
        num_requests, num_tokens, num_bytes, rate, replies = reply
        return Load(num_requests, num_tokens, num_bytes, float(rate)), replies


def _encoded_limits(settings: Settings) -> bytes:
    """As ``library.lua`` takes them."""
    names = ("waiting", "waiting_tokens", "waiting_bytes", "waiting_per_tenant", "waiting_tokens_per_tenant")
    return encode([getattr(settings, f"max_{name}") for name in names])


def _whereabouts(load: Load, reply: Sequence[int]) -> Whereabouts:
    """Waiting requests are taken for equally large: to look at all that are ahead would cost the broker too much."""
    position, *progress = reply
    if progress:
        num_computed, num_cached, milliseconds = progress
        return AtWork(num_computed, num_cached, milliseconds / 1000)
    return Place(position, load.estimated_wait * (position + 1) / max(1, load.num_requests))


def _seconds_to_drain(tokens: float, tokens_per_second: float) -> float:
    """No request waits for longer than LIVE_TTL: what takes so long has come to a standstill."""
    if tokens >= tokens_per_second * LIVE_TTL:
        return math.inf if tokens else 0.0
    return tokens / tokens_per_second


def _advice(seconds: float) -> str:
    """Also a long wait is told honestly, though no client is sent away for longer than Retry-After can say."""
    if math.isinf(seconds):
        return "nobody works on them at present, so try again later"
    return f"they will be worked on within about {max(1, round(seconds))} s, so try again then"
