"""A worker process around a network that computes nothing: token i of a request is a function of its seed and i.

Everything else is the real worker. A toxic request kills it before it can say anything of it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import time
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext, ForkServerProcess

from tests.service.worker.working import VOCABULARY, Counting, Hand
from tokenrelay.model.engine.request import Request
from tokenrelay.model.engine.step import Sampled, SchedulerOutput
from tokenrelay.service.broker import connect
from tokenrelay.service.embedded_valkey import die_with_parent
from tokenrelay.service.keys import Keys
from tokenrelay.service.settings import Settings
from tokenrelay.service.worker.role import Role

MODEL = "fake"
TOXIC = 1 << 31  # seeds from here on
STEP_SECONDS = 0.005

die_with_server = die_with_parent(signal.SIGKILL)  # made where the workers are forked


def token_of(seed: int, i: int) -> int:
    """The network."""
    return int.from_bytes(hashlib.sha256(b"%d %d" % (seed, i)).digest()[:2], "big") % VOCABULARY


def text_of(token_ids: list[int]) -> str:
    return "".join(f" {token_id}" for token_id in token_ids)


class Numbers:
    """A vocabulary in which every token is its own number."""

    strips_leading_space = False
    special_ids = frozenset[int]()

    def token_bytes(self, token_id: int) -> bytes:
        return b" %d" % token_id


class Hashing(Counting):
    """Takes its time for every step."""

    def execute(self, output: SchedulerOutput) -> list[Sampled]:
        time.sleep(STEP_SECONDS)
        return super().execute(output)

    def next_id(self, request: Request) -> int:
        seed = request.params.seed or 0
        if seed >= TOXIC:
            os.kill(os.getpid(), signal.SIGKILL)
        return token_of(seed, request.num_output_tokens)


def context() -> ForkServerContext:
    """Workers are forked from a process that has imported all they need: torch alone takes seconds."""
    server = get_context("forkserver")
    server.set_forkserver_preload([__name__, "pytest"])
    return server


def start(server: ForkServerContext, settings: Settings, worker_id: str) -> ForkServerProcess:
    process = server.Process(target=_run, args=(settings.model_dump(mode="json"), worker_id), daemon=True)
    process.start()
    return process


def _run(settings: dict[str, str], worker_id: str) -> None:
    die_with_server()
    asyncio.run(_work(Settings.model_validate(settings), worker_id))


async def _work(settings: Settings, worker_id: str) -> None:
    async with connect(settings.redis_url) as redis:
        await Hand(redis, Keys(MODEL), settings, Role(worker_id), Hashing(), Numbers()).worker.run()
