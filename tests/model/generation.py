"""Runs requests through an engine to their end."""

from __future__ import annotations

from collections.abc import Iterable

from tokenrelay.model.engine.engine import Engine
from tokenrelay.model.engine.request import Request


def generate(engine: Engine, requests: Iterable[Request]) -> dict[str, list[int]]:
    """Each request's output ids; the engine is empty and its books balance afterwards."""
    requests = list(requests)
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
    engine.scheduler.check_integrity()
    assert engine.scheduler.block_pool.usage == 0
    return {request.request_id: request.output_token_ids for request in requests}
