"""Refusing early: while the queue is full, no work is done for a request that would be refused."""

from __future__ import annotations

from fastapi import Request

from tokenrelay.service.api.admission.client_terms import IDEMPOTENCY_KEY
from tokenrelay.service.api.process import ApiProcess


async def require_room(request: Request) -> None:
    """Raises QueueFull or RateLimited. A request that may stand for an accepted one has to be looked at in full."""
    api: ApiProcess = request.app.state.api
    if IDEMPOTENCY_KEY not in request.headers:
        await api.queue.load.require_room(request.state.tenant)
