"""From measured requests to named numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenrelay.bench.measured import Measured, Run

Figures = dict[str, float]  # a figure that nothing was measured for is missing


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a request must keep to count as good, in milliseconds; None: anything."""

    ttft_ms: float | None = None
    gap_ms: float | None = None

    def met_by(self, request: Measured) -> bool:
        ttft_ms, gap_ms = request.time_to_first_token * 1e3, request.time_per_output_token * 1e3
        return ttft_ms <= _or_any(self.ttft_ms) and gap_ms <= _or_any(self.gap_ms)


def figures(run: Run, bounds: Bounds, *, alone: bool) -> Figures:
    """Latencies and throughput are those of the requests that ended well; ``alone``: they never met each other."""
    good = [request for request in run.requests if not request.error]
    refused = sum(request.refused for request in run.requests)
    counts = {"requests": len(good), "refused": refused, "errors": len(run.requests) - len(good) - refused}
    return {**_rates(run, good, bounds), **_latencies(good, alone), **_client(run, good), **counts}


def percentile(values: Iterable[float], share: float) -> float:
    """Nearest rank: the smallest value that at least this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def percentiles(name: str, seconds: Sequence[float], shares: Sequence[float] = (0.5, 0.9, 0.99)) -> Figures:
    if not seconds:
        return {}
    return {f"{name}_p{share * 100:g}_ms": percentile(seconds, share) * 1e3 for share in shares}


def _rates(run: Run, good: list[Measured], bounds: Bounds) -> Figures:
    rates = {
        "output_tokens_per_second": sum(request.output_tokens for request in good) / run.seconds,
        "prompt_tokens_per_second": sum(request.prompt_tokens for request in good) / run.seconds,
        "requests_per_second": len(good) / run.seconds,
    }
    goodput = {"goodput_requests_per_second": sum(map(bounds.met_by, good)) / run.seconds}
    return rates | (goodput if bounds != Bounds() else {})


def _latencies(good: list[Measured], alone: bool) -> Figures:
    prefill = [request.prompt_tokens / request.time_to_first_token for request in good]
    return {
        **({"prefill_tokens_per_second": percentile(prefill, 0.5)} if alone and good else {}),
        **percentiles("ttft", [request.time_to_first_token for request in good]),
        **percentiles("gap", [gap for request in good for gap in request.gaps]),
        **percentiles("tpot", [request.time_per_output_token for request in good if request.output_tokens > 1]),
        **percentiles("e2e", [request.ended - request.started for request in good]),
    }


def _client(run: Run, good: list[Measured]) -> Figures:
    num_chunks = sum(len(request.arrivals) for request in good)
    if not num_chunks:
        return {}
    per_chunk = {"tokens_per_chunk": sum(request.output_tokens for request in good) / num_chunks}
    return per_chunk | ({"client_cpu_us_per_chunk": run.cpu_seconds / num_chunks * 1e6} if run.cpu_seconds else {})


def _or_any(bound: float | None) -> float:
    return math.inf if bound is None else bound
