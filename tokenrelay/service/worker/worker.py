"""A model worker's life: startup → run → drain → shutdown.

The event loop claims requests, renews their leases and publishes; the engine's thread computes. Whatever this
process holds when it dies is reclaimed by another worker, from the log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from tokenrelay import __version__
from tokenrelay.model.engine.engine import Engine
from tokenrelay.model.structured.compiler import GrammarCompiler
from tokenrelay.service.errors import BrokerUnavailable
from tokenrelay.service.messages import WorkerFacts
from tokenrelay.service.metrics import WorkerMetrics
from tokenrelay.service.queue import Queue
from tokenrelay.service.registry import Registry
from tokenrelay.service.settings import Settings
from tokenrelay.service.token_log import Publication, TokenLog
from tokenrelay.service.worker.adapter_shelf import AdapterShelf
from tokenrelay.service.worker.engine_thread import EngineThread
from tokenrelay.service.worker.holdings import Holdings
from tokenrelay.service.worker.output_processor import OutputProcessor
from tokenrelay.service.worker.preparation import Preparations
from tokenrelay.service.worker.progress import LOOK_SECONDS
from tokenrelay.service.worker.pulse import Pulse
from tokenrelay.service.worker.role import Role, new_worker_id

log = structlog.get_logger()


class Worker:
    """One engine and its connection to the broker."""

    def __init__(
        self,
        engine: Engine,
        processor: OutputProcessor,
        compiler: GrammarCompiler,
        queue: Queue,
        token_log: TokenLog,
        registry: Registry,
        metrics: WorkerMetrics,
        settings: Settings,
        model: str,
        role: Role | None = None,
    ) -> None:
        self.worker_id, self._spare = role or Role(new_worker_id())
        self.announced = asyncio.Event()
        self._queue, self._token_log, self._registry = queue, token_log, registry
        self._metrics, self._settings, self._model = metrics, settings, model
        self._max_model_len = engine.max_model_len
        self._held = Holdings(settings.max_attempts)
        self._wake = asyncio.Event()
        self._drain = asyncio.Event()
        self._outbox: asyncio.Queue[list[Publication]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._reclaim_from = 0.0  # by the loop's clock
        self._broker_was_away = False
        self._death: asyncio.Future[BaseException] = self._loop.create_future()
        self._engine = EngineThread(
            engine,
            processor,
            metrics,
            publish=self._hand_to_loop,
            on_death=self.end,
            pulse=Pulse(settings.watchdog_seconds),
        )
        self._shelf = AdapterShelf(
            self._engine,
            lambda adapter: engine.read_adapter(Path(adapter.path), adapter.digest, settings.max_lora_rank),
            settings.max_loras,
        )
        self._preparations = Preparations(self._engine, compiler, self._shelf, self._held, self._note_prepared)

    def drain(self) -> None:
        """Claim nothing more, finish what runs up to the limit, hand back the rest. (SIGTERM)"""
        self._drain.set()
        self._wake.set()

    def end(self, error: BaseException) -> None:
        """What this worker cannot do without is gone, its engine or a part of it. May be called in any thread."""
        self._loop.call_soon_threadsafe(self._die, error)

    async def run(self) -> None:
        """Serve until drained. Raises what ended the engine or a loop, for the process to exit non-zero."""
        self._engine.start()
        loops = [
            asyncio.create_task(self._forever(turn, pause))
            for turn, pause in (
                (self._claim, 0.0),
                (self._heartbeat, self._settings.heartbeat_seconds),
                (self._announce, self._settings.announce_seconds),
                (self._publish, 0.0),
                (self._report, LOOK_SECONDS),
                (self._listen, 0.0),
            )
        ]
        for task in loops:
            task.add_done_callback(self._note_loop_end)
        try:
            await self._until_drained_or_dead()
            await self._hand_back()
        finally:
            tasks = [*loops, *self._preparations.tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # --- the six loops --------------------------------------------------------------------------------------------

    async def _forever(self, turn: Callable[[], Awaitable[None]], pause: float) -> None:
        """Repeat ``turn``; while the broker is gone try again, for it may come back."""
        while True:
            try:
                await turn()
                delay = pause
            except BrokerUnavailable as error:
                log.warning("broker unavailable", error=error.message)
                delay = 0.25
            await asyncio.sleep(delay)

    async def _claim(self) -> None:
        """Take what there is room for; then wait for a wake-up, or look again after a while."""
        self._wake.clear()
        room = self._room()
        if room > 0 and not (self._spare and await self._registry.num_active() >= self._settings.workers):
            for claim in await self._queue.claim(self.worker_id, room, unsuspected=self._held.unsuspected):
                self._held.add(claim)
                self._metrics.queue_time.observe(claim.queued_seconds)
                self._metrics.resumed_requests.inc(bool(claim.log))
                self._preparations.start(claim)
        await self._woken(self._settings.announce_seconds if self._spare else self._settings.heartbeat_seconds)

    def _room(self) -> int:
        """For how many requests there is room."""
        state = self._engine.state
        if state.num_waiting or self._drain.is_set() or self._held.on_trial or self._shelf.is_full:
            return 0
        return self._settings.max_num_seqs - max(len(self._held), state.num_choices)

    async def _heartbeat(self) -> None:
        """Renew before reclaiming: after a broker's outage leases have run out, ours and those of others that live."""
        held = dict(self._held.epochs)
        try:
            renewal = await self._queue.renew(self.worker_id, held)
        except BrokerUnavailable:
            self._broker_was_away = True
            raise
        if self._broker_was_away:
            self._broker_was_away = False
            self._reclaim_from = self._loop.time() + self._settings.lease_seconds
        for request_id in renewal.lost:
            self._lose(request_id, held[request_id])
        for request_id in renewal.cancelled:
            self._cancel(request_id)
        await self._queue.expire()
        if self._loop.time() >= self._reclaim_from and await self._queue.reclaim():
            self._wake.set()

    async def _announce(self) -> None:
        await self._registry.announce(self._facts())
        self.announced.set()

    async def _publish(self) -> None:
        """One step's publications, repeated until the broker has them: publishing is idempotent."""
        publications = await self._outbox.get()
        while True:
            try:
                await self._publish_once(publications)
                break
            except BrokerUnavailable:
                await asyncio.sleep(0.1)
        self._engine.published()
        self._outbox.task_done()

    async def _publish_once(self, publications: list[Publication]) -> None:
        open_ended = [p for p in publications if not p.events[-1].terminal]
        refused = set(await self._token_log.publish(self.worker_id, open_ended) if open_ended else [])
        for publication in publications:
            if self._held.note_progress(publication.request_id):
                self._wake.set()
            if publication.events[-1].terminal:
                if not await self._token_log.finish(self.worker_id, publication):
                    refused.add(publication.request_id)
                self._held.forget(publication.request_id, publication.epoch)
                self._shelf.release((publication.request_id, publication.epoch))
                self._wake.set()
            if publication.request_id in refused:
                self._metrics.fenced_writes.inc()
                self._lose(publication.request_id, publication.epoch)

    async def _report(self) -> None:
        """How far long prompts are; nothing waits for it, so what is lost is lost."""
        if news := self._engine.progress.news(self._held.epochs):
            await self._token_log.report(self.worker_id, news)

    async def _listen(self) -> None:
        """Wake-ups make work start, and end, sooner; losing one costs a heartbeat."""
        async for message in self._queue.wakeups():
            verb, _, request_id = message.partition(" ")
            if verb == "cancel" and request_id in self._held:
                self._cancel(request_id)
            elif verb == "drop" and request_id in self._held:
                self._lose(request_id, self._held.epochs[request_id])
            self._wake.set()

    async def _woken(self, seconds: float) -> None:
        """Wait for a wake-up, at most so long. (Python 3.11's wait_for can swallow a cancellation.)"""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    # --- the rest -------------------------------------------------------------------------------------------------

    def _cancel(self, request_id: str) -> None:
        if not self._preparations.cancel(request_id):
            self._engine.cancel(request_id)

    def _lose(self, request_id: str, epoch: int) -> None:
        """Another owns it now; unless that is us again, under a newer epoch."""
        if self._held.forget(request_id, epoch):
            self._engine.drop(request_id)
            self._shelf.release((request_id, epoch))

    async def _until_drained_or_dead(self) -> None:
        drain = asyncio.create_task(self._drain.wait())
        ends: list[asyncio.Future[Any]] = [drain, self._death]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        drain.cancel()
        if self._death.done():
            raise self._death.result()
        await self._registry.announce(self._facts())
        deadline = self._loop.time() + self._settings.drain_seconds
        while self._held and self._loop.time() < deadline and not self._death.done():
            self._wake.clear()
            await self._woken(min(0.25, max(0.0, deadline - self._loop.time())))

    async def _hand_back(self) -> None:
        """Stop computing, publish what is computed, and let other workers continue the rest."""
        self._engine.stop()
        await asyncio.to_thread(self._engine.join, 10.0)
        await asyncio.sleep(0)  # what the thread handed over last is in the outbox now
        await self._outbox.join()
        for request_id, epoch in self._held.epochs.items():
            await self._queue.release(self.worker_id, request_id, epoch)
        log.info("drained", handed_back=len(self._held))
        await self._registry.withdraw(self.worker_id)

    def _facts(self) -> WorkerFacts:
        state = self._engine.state
        return WorkerFacts(
            worker_id=self.worker_id,
            model=self._model,
            max_model_len=self._max_model_len,
            step_counter=state.num_turns,
            num_requests_running=state.num_running,
            num_requests_waiting=state.num_waiting,
            kv_cache_usage=state.kv_cache_usage,
            draining=self._drain.is_set(),
            stalled=self._engine.pulse.stalled,
            spare=self._spare,
            version=__version__,
        )

    def _hand_to_loop(self, publications: list[Publication]) -> None:
        self._loop.call_soon_threadsafe(self._outbox.put_nowait, publications)

    def _note_loop_end(self, task: asyncio.Task[None]) -> None:
        """A worker that goes on without one of its loops would look alive, and claim or publish nothing."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._die(error)

    def _note_prepared(self, task: asyncio.Task[None]) -> None:
        self._note_loop_end(task)
        self._wake.set()  # while it waited for an adapter's room, nothing was claimed

    def _die(self, error: BaseException) -> None:
        if not self._death.done():
            self._death.set_result(error)
