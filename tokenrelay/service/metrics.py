"""Every metric, declared once. The stems are the ones operators know from other servers.

``ApiMetrics`` lives in an API process, ``WorkerMetrics`` in a model worker; both are scraped. Invariant, per API
process: the sum of ``tokenrelay_requests_total`` over outcomes equals accepted requests minus those in flight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from tokenrelay.service.load import Load
from tokenrelay.service.settings import shared_metrics_folder
from tokenrelay.service.tenant_metrics import TenantMetrics

LATENCY_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640),
)
TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


def new_registry() -> CollectorRegistry:
    """A registry with the process's own CPU, memory and file descriptors."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry


class ApiMetrics:
    """What a client sees: counted where it is seen, and added up over the API processes of a machine.

    Their gauges are the same queue's, so the largest counts; only requests in flight are added up.
    """

    def __init__(self, registry: CollectorRegistry, model: str, max_tenants: int = 20) -> None:
        self.registry = registry
        self.tenants = TenantMetrics(registry, model, max_tenants)
        counter = _of(Counter, registry, model)
        gauge = _of(Gauge, registry, model, multiprocess_mode="livemax")
        sum_gauge = _of(Gauge, registry, model, multiprocess_mode="livesum")
        latency = _of(Histogram, registry, model, buckets=LATENCY_BUCKETS)
        tokens = _of(Histogram, registry, model, buckets=TOKEN_BUCKETS)
        self._outcomes = Counter(
            "tokenrelay_requests",
            "Accepted requests that ended, by outcome.",
            ["model_name", "outcome"],
            registry=registry,
        )
        self._refusals = Counter(
            "tokenrelay_requests_refused",
            "Requests refused before they were queued, by error code.",
            ["model_name", "code"],
            registry=registry,
        )
        for code in ("internal_error", "worker_lost"):  # present from the start, or increase() misses their first
            self._outcomes.labels(model, code)
        self._model = model
        self.requests_accepted = counter("tokenrelay_requests_accepted", "Requests that entered the queue.")
        self.requests_in_flight = sum_gauge(
            "tokenrelay_requests_in_flight", "Accepted requests of this process that have not ended."
        )
        self.num_requests_waiting = gauge(
            "tokenrelay_num_requests_waiting", "Requests in the queue, not yet claimed by a worker."
        )
        self.num_tokens_waiting = gauge("tokenrelay_num_tokens_waiting", "Tokens they ask for, prompts included.")
        self.waiting_bytes = gauge("tokenrelay_waiting_bytes", "Memory they take in the broker.")
        self.estimated_wait = gauge(
            "tokenrelay_estimated_wait_seconds",
            "Until all that waits is worked on, at the measured rate; infinite at a standstill.",
        )
        self.api_keys = gauge("tokenrelay_api_keys", "API keys that are let in; 0 without a file of them.")
        self.api_keys_broken = gauge(
            "tokenrelay_api_keys_broken", "1 while the file of API keys cannot be used, and older ones go on."
        )
        self.streams_joined = counter(
            "tokenrelay_streams_joined", "Requests read again: by their id, or by a repeated Idempotency-Key."
        )
        self.prompt_tokens = counter("tokenrelay_prompt_tokens", "Prompt tokens of accepted requests.")
        self.generation_tokens = counter("tokenrelay_generation_tokens", "Tokens delivered to clients.")
        self.time_to_first_token = latency(
            "tokenrelay_time_to_first_token_seconds", "From acceptance to the first token's arrival at the API."
        )
        self.inter_token_latency = latency(
            "tokenrelay_inter_token_latency_seconds", "Between two events of one choice of a request."
        )
        self.e2e_request_latency = latency(
            "tokenrelay_e2e_request_latency_seconds", "From acceptance to the terminal event."
        )
        self.request_prompt_tokens = tokens("tokenrelay_request_prompt_tokens", "Prompt tokens per request.")
        self.request_generation_tokens = tokens("tokenrelay_request_generation_tokens", "Generated tokens per request.")

    def ended(self, outcome: str) -> None:
        """Count one terminal event: a finish reason, ``cancelled``, or an error's code."""
        self._outcomes.labels(self._model, outcome).inc()

    def note_load(self, load: Load) -> None:
        """What waits now, by the broker's books."""
        self.num_requests_waiting.set(load.num_requests)
        self.num_tokens_waiting.set(load.num_tokens)
        self.waiting_bytes.set(load.num_bytes)
        self.estimated_wait.set(load.estimated_wait)

    def refused(self, code: str) -> None:
        self._refusals.labels(self._model, code).inc()

    def exposition(self) -> bytes:
        """Prometheus' text format."""
        registry = self.registry
        if shared_metrics_folder():
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


class WorkerMetrics:
    """What the engine does."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        self.registry = registry
        counter = _of(Counter, registry, model)
        gauge = _of(Gauge, registry, model)
        latency = _of(Histogram, registry, model, buckets=LATENCY_BUCKETS)
        tokens = _of(Histogram, registry, model, buckets=TOKEN_BUCKETS)
        self.num_requests_running = gauge("tokenrelay_num_requests_running", "Requests that hold KV blocks.")
        self.num_requests_queued = gauge(
            "tokenrelay_engine_num_requests_waiting", "Claimed requests that wait inside the engine."
        )
        self.kv_cache_usage = gauge("tokenrelay_kv_cache_usage_ratio", "Share of KV blocks in use, 0 to 1.")
        self.kv_cache_blocks = gauge("tokenrelay_kv_cache_blocks", "KV blocks in the pool.")
        self.prefix_cache_queries = counter("tokenrelay_prefix_cache_queries", "Prompt tokens looked up.")
        self.prefix_cache_hits = counter("tokenrelay_prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self.num_preemptions = counter("tokenrelay_num_preemptions", "Requests sent back to recompute.")
        self.draft_tokens = counter("tokenrelay_spec_decode_num_draft_tokens", "Guessed tokens that were verified.")
        self.accepted_tokens = counter("tokenrelay_spec_decode_num_accepted_tokens", "Of these, right.")
        self.prefill_tokens = counter(
            "tokenrelay_engine_prefill_tokens", "Rows computed beside one per sampling request: prompts and drafts."
        )
        self.decode_tokens = counter("tokenrelay_engine_decode_tokens", "Tokens sampled.")
        self.fenced_writes = counter(
            "tokenrelay_fenced_writes", "Writes the broker refused because another worker owns the request."
        )
        self.resumed_requests = counter(
            "tokenrelay_requests_resumed", "Claimed requests that another worker had begun."
        )
        self.queue_time = latency(
            "tokenrelay_request_queue_time_seconds", "From submission to a worker's claim (the broker's clock)."
        )
        self.step_time = latency("tokenrelay_engine_step_seconds", "One step: schedule, execute, update.")
        self.iteration_tokens = tokens("tokenrelay_iteration_tokens", "Tokens computed in one step.")


M = TypeVar("M", Counter, Gauge, Histogram)


def _of(kind: type[M], registry: CollectorRegistry, model: str, **options: Any) -> Callable[[str, str], M]:
    """A maker of metrics that carry the model's name, already bound to it."""

    def make(name: str, documentation: str) -> M:
        return kind(name, documentation, ["model_name"], registry=registry, **options).labels(model)

    return make
