"""How long a request took, by its timeline in the broker: one clock, whichever workers it ran on."""

from __future__ import annotations

from collections.abc import Sequence

from tokenrelay.service.api.schemas.usage import CompletionUsage, Timings
from tokenrelay.service.request_records import Moment


def timings_of(timelines: Sequence[Sequence[Moment]], usage: CompletionUsage) -> Timings:
    """Of all prompts together, from the first that was queued to the last that ended."""
    moments = sorted(moment for timeline in timelines for moment in timeline)
    queued = _first(moments, "queued", 0.0)
    claimed = _first(moments, "claimed", queued)
    first_token = _first(moments, "first_token", claimed)
    ended = moments[-1].at if moments else first_token
    prompt_seconds, predicted_seconds = first_token - claimed, ended - first_token
    return Timings(
        queue_ms=_milliseconds(claimed - queued),
        prompt_n=usage.prompt_tokens,
        prompt_ms=_milliseconds(prompt_seconds),
        prompt_per_second=_rate(usage.prompt_tokens, prompt_seconds),
        predicted_n=usage.completion_tokens,
        predicted_ms=_milliseconds(predicted_seconds),
        predicted_per_second=_rate(usage.completion_tokens, predicted_seconds),
    )


def _first(moments: Sequence[Moment], event: str, otherwise: float) -> float:
    return next((moment.at for moment in moments if moment.event == event), otherwise)


def _milliseconds(seconds: float) -> float:
    return round(1000 * max(0.0, seconds), 1)


def _rate(count: int, seconds: float) -> float:
    """Per second; the broker counts milliseconds."""
    return round(count / max(seconds, 0.001), 2)
