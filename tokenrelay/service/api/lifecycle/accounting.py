"""What one accepted request adds to the metrics, from its acceptance to its one outcome."""

from __future__ import annotations

import time

from tokenrelay.service.messages import Event, Submission
from tokenrelay.service.metrics import ApiMetrics


class RequestAccount:
    """Open from acceptance until ``end``; whoever ends it first decides the outcome."""

    def __init__(self, submission: Submission, metrics: ApiMetrics) -> None:
        self.ended = False
        self._metrics = metrics
        self._tenant = submission.tenant
        self._accepted_at = time.perf_counter()
        self._last_event_at: dict[int, float] = {}  # by choice
        self._generation_tokens = 0
        self._finish_reason = ""
        prompt_tokens = len(submission.prompt_token_ids)
        metrics.requests_accepted.inc()
        metrics.requests_in_flight.inc()
        metrics.prompt_tokens.inc(prompt_tokens)
        metrics.request_prompt_tokens.observe(prompt_tokens)
        metrics.tenants.accepted(self._tenant, prompt_tokens)

    def note(self, event: Event) -> None:
        """One event passed, on its way to the client."""
        if event.token_ids:
            self._note_tokens(event)
        self._finish_reason = event.finish_reason or self._finish_reason
        if event.terminal:
            self.end(event.error.code if event.error else self._finish_reason)

    def _note_tokens(self, event: Event) -> None:
        now = time.perf_counter()
        if not self._last_event_at:
            self._metrics.time_to_first_token.observe(now - self._accepted_at)
        elif event.choice in self._last_event_at:
            self._metrics.inter_token_latency.observe(now - self._last_event_at[event.choice])
        self._last_event_at[event.choice] = now
        self._generation_tokens += len(event.token_ids)
        self._metrics.generation_tokens.inc(len(event.token_ids))
        self._metrics.tenants.delivered(self._tenant, len(event.token_ids))

    def end(self, outcome: str) -> None:
        if self.ended:
            return
        self.ended = True
        self._metrics.ended(outcome)
        self._metrics.requests_in_flight.dec()
        self._metrics.e2e_request_latency.observe(time.perf_counter() - self._accepted_at)
        self._metrics.request_generation_tokens.observe(self._generation_tokens)
