"""Paced requests while workers are killed, the broker is killed, and toxic requests kill whoever touches them.

After docket's chaos driver, which counts what arrives; here every request must end exactly once with the right text.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import count
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.chaos import fake_worker
from tests.chaos.fake_worker import MODEL, TOXIC, text_of, token_of
from tokenrelay.model.sampling_params import SamplingParams
from tokenrelay.service.broker import connect
from tokenrelay.service.dead_letters import DeadLetters
from tokenrelay.service.embedded_valkey import EmbeddedValkey
from tokenrelay.service.errors import BrokerUnavailable, QueueFull
from tokenrelay.service.keys import Keys
from tokenrelay.service.mailbox import Mailbox
from tokenrelay.service.messages import Event, Submission
from tokenrelay.service.queue import Queue
from tokenrelay.service.request_records import Moment, RequestRecords
from tokenrelay.service.settings import Settings
from tokenrelay.service.terms import AnswerSpec, Terms
from tokenrelay.service.token_log import TokenLog

NUM_WORKERS = 4
MOST_TOKENS = 12
TERMS = Terms(answer=AnswerSpec(route="completion", model=MODEL, created=0, num_prompt_tokens=3))
LEASE = 2.0  # seconds
TICK = 0.25
RETRY_SECONDS = 0.1


class Chances(NamedTuple):
    """Of what may happen every tick."""

    broker_kill: float = 0.02
    worker_kill: float = 0.08
    toxic_request: float = 0.05


class Fleet:
    """Worker processes; who dies is replaced, but its requests wait until their leases are over."""

    def __init__(self, settings: Settings) -> None:
        self._context, self._settings = fake_worker.context(), settings
        self._numbers = count()
        self._workers: dict[str, ForkServerProcess] = {}
        self.dead: set[str] = set()  # their names

    def replace_dead(self) -> None:
        self.dead |= {name for name, worker in self._workers.items() if not worker.is_alive()}
        self._workers = {name: worker for name, worker in self._workers.items() if name not in self.dead}
        while len(self._workers) < NUM_WORKERS:
            name = f"fake-{next(self._numbers)}"
            self._workers[name] = fake_worker.start(self._context, self._settings, name)

    def kill_one(self, chance: random.Random) -> None:
        chance.choice(list(self._workers.values())).kill()

    def dismiss(self) -> None:
        for worker in self._workers.values():
            worker.kill()
            worker.join()


class Client:
    """Sends requests, and judges how each ends."""

    def __init__(self, queue: Queue, token_log: TokenLog, records: RequestRecords, mailbox: Mailbox) -> None:
        self._queue, self._token_log, self._records, self._mailbox = queue, token_log, records, mailbox
        self.outcomes: Counter[str] = Counter()
        self.failures: dict[int, tuple[str, list[Moment]]] = {}  # by seed: what became of it, and how

    async def read_mailbox(self) -> None:
        """For ever: whatever else ends it is a fault."""
        try:
            await self._mailbox.run()
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            assert task
            if not task.cancelling():
                raise AssertionError("the mailbox was cancelled by nobody") from error
            raise

    async def ask(self, seed: int) -> None:
        request_id, num_tokens = f"request-{seed}", 1 + seed % MOST_TOKENS
        async with self._mailbox.subscribe(request_id) as events:
            await self._submit(
                Submission(
                    request_id=request_id,
                    prompt_token_ids=[1, 2, 3],
                    params=SamplingParams(max_tokens=num_tokens, seed=seed, ignore_eos=True),
                )
            )
            entries = [entry async for entry in events]
        kept, timeline = await self._kept(request_id)
        outcome = judged(seed, num_tokens, entries) if kept == entries else "log differs"
        self.outcomes[outcome] += 1
        if outcome != "right":
            self.failures[seed] = outcome, timeline

    async def _submit(self, submission: Submission) -> None:
        """Until it is accepted: the relay takes a repeated one for the same."""
        while True:
            try:
                await self._queue.submit(submission, mailbox=self._mailbox.name, terms=TERMS)
                return
            except (BrokerUnavailable, QueueFull):
                await asyncio.sleep(RETRY_SECONDS)

    async def _kept(self, request_id: str) -> tuple[list[tuple[int, Event]], list[Moment]]:
        """The broker's memory of it."""
        while True:
            with suppress(BrokerUnavailable):
                return await self._token_log.read(request_id), (await self._records.read(request_id)).timeline
            await asyncio.sleep(RETRY_SECONDS)


def judged(seed: int, num_tokens: int, entries: list[tuple[int, Event]]) -> str:
    """What became of a request, in a word."""
    events = [event for _, event in entries]
    if [index for index, _ in entries] != list(range(1, len(entries) + 1)):
        return "indexes"
    if [event.terminal for event in events] != [False] * (len(events) - 1) + [True]:
        return "endings"
    if error := events[-1].error:
        return error.code if len(events) == 1 else f"{error.code} in between"
    expected = [token_of(seed, i) for i in range(num_tokens)]
    right = [token_id for event in events for token_id in event.token_ids] == expected
    right = right and "".join(event.text for event in events) == text_of(expected)
    return "right" if right and events[-1].finish_reason == "length" else "wrong"


class Site:
    """A broker, workers, a client, and misfortune."""

    def __init__(self, broker: EmbeddedValkey, fleet: Fleet, client: Client, chances: Chances) -> None:
        self.fleet, self.client, self.happened = fleet, client, Counter[str]()
        self._broker, self._chances, self._chance = broker, chances, random.Random(2)

    @property
    def toxic_seeds(self) -> set[int]:
        """Of those sent so far."""
        return set(range(TOXIC, TOXIC + self.happened["toxic_request"]))

    async def run(self, num_requests: int, per_second: float) -> None:
        """Returns when every request has ended."""
        self.fleet.replace_dead()  # the first start of processes takes seconds, in which nothing is paced
        async with asyncio.TaskGroup() as background:
            everlasting = [background.create_task(task) for task in (self._replace_dead(), self.client.read_mailbox())]
            async with asyncio.TaskGroup() as asking:
                misfortune = background.create_task(self._misfortune(asking))
                started = time.monotonic()
                for seed in range(num_requests):
                    await asyncio.sleep(started + seed / per_second - time.monotonic())
                    asking.create_task(self.client.ask(seed))
                misfortune.cancel()
            for task in everlasting:
                task.cancel()

    async def _replace_dead(self) -> None:
        while True:
            self.fleet.replace_dead()
            await asyncio.sleep(TICK)

    async def _misfortune(self, asking: asyncio.TaskGroup) -> None:
        """Each kind once, whatever its chance; then as it comes."""
        for name in Chances._fields:
            await asyncio.sleep(TICK)
            self._let_happen(name, asking)
        while True:
            await asyncio.sleep(TICK)
            for name, chance in self._chances._asdict().items():
                if self._chance.random() < chance:
                    self._let_happen(name, asking)

    def _let_happen(self, name: str, asking: asyncio.TaskGroup) -> None:
        self.happened[name] += 1
        if name == "toxic_request":
            asking.create_task(self.client.ask(max(self.toxic_seeds)))
        elif name == "worker_kill":
            self.fleet.kill_one(self._chance)
        else:
            assert self._broker.pid
            os.kill(self._broker.pid, signal.SIGKILL)
            self._broker.wait(60)
            self._broker.start()


@asynccontextmanager
async def site(folder: Path, chances: Chances) -> AsyncIterator[tuple[Site, DeadLetters, Queue]]:
    broker = EmbeddedValkey(folder, memory_mb=256)
    settings = Settings(redis_url=broker.start(), lease_seconds=LEASE, retention_seconds=600, drain_seconds=0)
    async with AsyncExitStack() as stack:
        stack.callback(broker.stop)
        redis = await stack.enter_async_context(connect(broker.url))
        blocking = await stack.enter_async_context(connect(broker.url, blocking=True))
        relay = (redis, Keys(MODEL), settings)
        queue, token_log, records = Queue(*relay), TokenLog(*relay), RequestRecords(redis, Keys(MODEL))
        mailbox = Mailbox(blocking, redis, Keys(MODEL), token_log, "client")
        fleet = Fleet(settings)
        stack.callback(fleet.dismiss)
        yield (
            Site(broker, fleet, Client(queue, token_log, records, mailbox), chances),
            DeadLetters(redis, settings),
            queue,
        )


async def check(folder: Path, num_requests: int, per_second: float, chances: Chances) -> None:
    async with site(folder, chances) as (running, dead_letters, queue):
        started = time.monotonic()
        await running.run(num_requests, per_second)
        seconds, happened = time.monotonic() - started, running.happened
        print(f"\n{num_requests} requests in {seconds:.0f} s: {dict(happened)}")
        print(f"  workers that died: {len(running.fleet.dead)}; outcomes: {dict(running.client.outcomes)}")
        for seed in running.client.failures.keys() - running.toxic_seeds:
            print(f"  {seed}: {running.client.failures[seed]}")
        assert running.client.outcomes == {"right": num_requests, "worker_lost": happened["toxic_request"]}
        assert running.client.failures.keys() == running.toxic_seeds
        letters = await dead_letters.all()
        assert {letter.submission.params.seed for letter in letters if letter.submission} == running.toxic_seeds
        assert len(letters) == len(running.toxic_seeds)
        assert all(letter.attempts <= 3 and not letter.num_events for letter in letters)
        assert await queue.num_waiting() == 0


async def test_some_hundred_requests(tmp_path: Path) -> None:
    await check(tmp_path, 300, 100, Chances(broker_kill=0.15, worker_kill=0.4, toxic_request=0.25))


@pytest.mark.long
@pytest.mark.timeout(1800)
async def test_twenty_thousand_requests(tmp_path: Path) -> None:
    await check(tmp_path, 20_000, 100, Chances())
