"""A worker that lost one of its parts ends, so that its requests go elsewhere."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from tokenrelay.model.config import EngineConfig
from tokenrelay.model.engine.engine import Engine
from tokenrelay.model.engine.scheduler import Scheduler
from tokenrelay.service.metrics import WorkerMetrics
from tokenrelay.service.settings import Settings
from tokenrelay.service.worker.output_processor import OutputProcessor
from tokenrelay.service.worker.worker import Worker


class _Broken:
    """A broker's client in which every call meets a fault that is not the broker's absence."""

    def __getattr__(self, name: str) -> Any:
        raise ZeroDivisionError(name)


async def test_a_fault_in_a_loop_ends_the_worker() -> None:
    engine = Engine(Scheduler(EngineConfig(), 4, 64, []), None, 64)  # type: ignore[arg-type]
    broken: Any = _Broken()
    processor = OutputProcessor(broken)
    metrics = WorkerMetrics(CollectorRegistry(), "m")
    worker = Worker(engine, processor, broken, broken, broken, broken, metrics, Settings(), "m")
    with pytest.raises(ZeroDivisionError):
        async with asyncio.timeout(60):
            await worker.run()
    worker._engine.stop()
