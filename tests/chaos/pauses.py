"""How long clients waited because a worker died, and what for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import httpx

from tests.chaos.streams import Recording


class Pause(NamedTuple):
    """Of one stream; seconds. ``seen`` is between two chunks, the others are what the request's timeline tells."""

    seen: float
    detection: float  # from the death until the request waited again
    claim: float  # until another worker had it
    first_token: float  # until its client had the next token


def pauses(http: httpx.Client, recordings: Iterable[Recording], killed_at: float) -> list[Pause]:
    """Of the streams that a worker worked on when it died."""
    found = [_pause(http, recording, killed_at) for recording in recordings]
    return [pause for pause in found if pause]


def _pause(http: httpx.Client, recording: Recording, killed_at: float) -> Pause | None:
    timeline = http.get(f"/v1/requests/{recording.request_id}").json()["timeline"]
    requeued = [entry["at"] for entry in timeline if entry["event"] == "requeued"]
    if not requeued:
        return None
    claimed = next(e["at"] for e in timeline if e["event"] == "claimed" and e["at"] >= requeued[-1])
    resumed = recording.first_arrival_after(claimed)
    assert resumed, "a request that was handed on had something to say"
    before = max((arrival for arrival in recording.arrivals if arrival < claimed), default=killed_at)
    return Pause(resumed - before, requeued[-1] - killed_at, claimed - requeued[-1], resumed - claimed)


def report(title: str, measured: Sequence[Pause]) -> None:
    """Print the distribution of each part."""
    print(f"\n{title}: {len(measured)} pauses; p50, p99, worst in seconds")
    for part in Pause._fields:
        values = [getattr(pause, part) for pause in measured]
        figures = (percentile(values, 50), percentile(values, 99), max(values))
        print(f"  {part:12} " + "  ".join(f"{figure:6.2f}" for figure in figures))


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest that so many percent do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
