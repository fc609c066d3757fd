"""Who asks, and how much they may: what an API key stands for. Without keys, everybody is the default tenant."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0, le=10**12)]

MIN_WEIGHT, MAX_WEIGHT = 0.01, 100.0  # the queue's order has room for no more


class Limits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Of one tenant, over all API processes; 0: none. ``max_tokens`` are what one request may generate altogether."""

    requests_per_minute: Count = 0
    tokens_per_minute: Count = 0
    concurrent_requests: Count = 0
    max_tokens: Count = 0


NO_LIMITS = Limits()


class Tenant(NamedTuple):
    """Sees its own requests only. ``weight`` is its share of the queue; an operator may read the metrics, too."""

    name: str
    weight: float = 1.0
    limits: Limits = NO_LIMITS
    is_operator: bool = False


DEFAULT_TENANT = Tenant("default", is_operator=True)
