"""A whole worker around a network that only counts: real broker, real engine, no model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from tokenrelay.model.config import EngineConfig
from tokenrelay.model.detokenizer import TokenBytes
from tokenrelay.model.engine.engine import Engine
from tokenrelay.model.engine.request import Request
from tokenrelay.model.engine.scheduler import Scheduler
from tokenrelay.model.engine.step import Sampled, SchedulerOutput
from tokenrelay.service.keys import Keys
from tokenrelay.service.metrics import WorkerMetrics
from tokenrelay.service.queue import Queue
from tokenrelay.service.registry import Registry
from tokenrelay.service.settings import Settings
from tokenrelay.service.token_log import TokenLog
from tokenrelay.service.worker.output_processor import OutputProcessor
from tokenrelay.service.worker.role import Role
from tokenrelay.service.worker.worker import Worker

VOCABULARY, CONTEXT = 1024, 512


class Letters:
    """A vocabulary in which every token is an x."""

    strips_leading_space = False
    special_ids = frozenset[int]()

    def token_bytes(self, token_id: int) -> bytes:
        return b"x"


class Counting:
    """The next token's id is the number of tokens so far. A closed ``gate`` is an engine that hangs."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()

    def execute(self, output: SchedulerOutput) -> list[Sampled]:
        self.gate.wait(60)
        return [Sampled((self.next_id(entry.request),)) if entry.samples else Sampled() for entry in output.scheduled]

    def next_id(self, request: Request) -> int:
        return request.num_tokens


class Hand:
    """A worker that runs, and its engine's gate."""

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        settings: Settings,
        role: Role,
        network: Counting | None = None,
        vocabulary: TokenBytes | None = None,
        engine: Engine | None = None,
    ) -> None:
        self.network = network or Counting()
        engine = engine or Engine(Scheduler(EngineConfig(), 64, CONTEXT, []), self.network, CONTEXT)  # type: ignore[arg-type]
        relay = (redis, keys, settings)
        nothing: Any = None
        self.metrics = WorkerMetrics(CollectorRegistry(), "m")
        self.worker = Worker(
            engine,
            OutputProcessor(vocabulary or Letters()),
            nothing,  # no grammars are compiled
            Queue(*relay),
            TokenLog(*relay),
            Registry(*relay),
            self.metrics,
            settings,
            "m",
            role,
        )
        self.held = self.worker._held


@asynccontextmanager
async def working(
    redis: Redis,
    keys: Keys,
    settings: Settings,
    role: Role,
    network: Counting | None = None,
    engine: Engine | None = None,
) -> AsyncIterator[Hand]:
    """It is announced when the body begins; in the end it drains, or is simply gone if it was cancelled.

    ``engine``: a real one, instead of that which counts.
    """
    hand = Hand(redis, keys, settings, role, network, engine=engine)
    running = asyncio.create_task(hand.worker.run())
    await hand.worker.announced.wait()
    yield hand
    hand.network.gate.set()
    hand.worker.drain()
    await running
