"""What tenants use, by name as far as the operator wants: labels are bounded, whoever is in the file of keys."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter

OTHER = "other"


class TenantMetrics:
    """The first ``max_named`` tenants it is told of have their own labels, for good; the rest are OTHER."""

    def __init__(self, registry: CollectorRegistry, model: str, max_named: int) -> None:
        self._model = model
        self._max_named = max_named
        self._named: list[str] = []
        self._requests, self._prompt_tokens, self._generation_tokens = (
            Counter(f"tokenrelay_tenant_{what}", description, ["model_name", "tenant"], registry=registry)
            for what, description in (
                ("requests", "Accepted requests, by tenant."),
                ("prompt_tokens", "Prompt tokens of accepted requests, by tenant."),
                ("generation_tokens", "Tokens delivered to clients, by tenant."),
            )
        )

    def name(self, tenants: Sequence[str]) -> None:
        """In the order in which they get labels of their own."""
        new = [tenant for tenant in tenants if tenant not in self._named]
        self._named += new[: self._max_named - len(self._named)]

    def accepted(self, tenant: str, num_prompt_tokens: int) -> None:
        self._requests.labels(*self._labels(tenant)).inc()
        self._prompt_tokens.labels(*self._labels(tenant)).inc(num_prompt_tokens)

    def delivered(self, tenant: str, num_tokens: int) -> None:
        self._generation_tokens.labels(*self._labels(tenant)).inc(num_tokens)

    def _labels(self, tenant: str) -> tuple[str, str]:
        return self._model, tenant if tenant in self._named else OTHER
