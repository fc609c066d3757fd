"""The thread that owns the engine: it takes commands between steps and hands out what is to be published.

Nothing else touches the engine. The thread waits when there is no work, and when publishing falls behind.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tokenrelay.model.engine.engine import Engine
from tokenrelay.model.engine.step import StepOutput
from tokenrelay.model.structured.compiler import CompiledGrammar
from tokenrelay.model.structured.constraint import Constraint
from tokenrelay.model.transformer.lora import Adapter
from tokenrelay.service.errors import ContextLengthExceeded, InvalidGrammar
from tokenrelay.service.messages import Error
from tokenrelay.service.metrics import WorkerMetrics
from tokenrelay.service.queue import Claim
from tokenrelay.service.token_log import Publication
from tokenrelay.service.worker.output_processor import OutputProcessor, split_engine_id
from tokenrelay.service.worker.progress import ProgressMeter
from tokenrelay.service.worker.pulse import Pulse

MAX_UNPUBLISHED_STEPS = 32  # about a second of tokens: the broker may hiccup, memory may not grow
IDLE_SECONDS = 0.25  # an idle engine turns over this often, to show that it lives

Command = Callable[[], None]


class EngineState(NamedTuple):
    """What other threads may know of the engine: as of the last step."""

    num_turns: int = 0  # of the loop below: its progress is the engine's pulse
    num_running: int = 0
    num_waiting: int = 0
    num_choices: int = 0
    kv_cache_usage: float = 0.0


class EngineThread(threading.Thread):
    """Args: ``publish`` gets each step's publications, in this thread; ``on_death`` the exception that ended it."""

    def __init__(
        self,
        engine: Engine,
        processor: OutputProcessor,
        metrics: WorkerMetrics,
        *,
        publish: Callable[[list[Publication]], None],
        on_death: Callable[[BaseException], None],
        pulse: Pulse | None = None,
    ) -> None:
        super().__init__(name="engine", daemon=True)
        self.pulse = pulse or Pulse()
        self.state = EngineState()
        self.progress = ProgressMeter()
        self._engine = engine
        self._processor = processor
        self._metrics = metrics
        self._publish = publish
        self._on_death = on_death
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._unpublished = threading.BoundedSemaphore(MAX_UNPUBLISHED_STEPS)
        self._constraints: dict[str, Constraint] = {}  # by engine id, while the request runs
        self._num_turns = 0
        self._counted = (0,) * 5  # what is already in the metrics of the scheduler's counters

    # --- called from other threads --------------------------------------------------------------------------------

    def add(self, claim: Claim, grammar: CompiledGrammar | None = None) -> None:
        """``grammar`` is the submission's, compiled."""
        self._commands.put(lambda: self._add(claim, grammar))

    def refuse(self, claim: Claim, error: Error | None) -> None:
        """End the request with an error, or as cancelled, nothing of it computed."""
        self._commands.put(lambda: self._refuse(claim, error))

    def add_adapter(self, adapter_id: str, adapter: Adapter) -> None:
        """Requests that are added later may use it."""
        self._commands.put(lambda: self._engine.runner.adapters.add(adapter_id, adapter))

    def remove_adapter(self, adapter_id: str) -> None:
        """No request that was added, and is not dropped, may use it."""
        self._commands.put(lambda: self._engine.runner.adapters.remove(adapter_id))

    def cancel(self, request_id: str) -> None:
        """End the request with a terminal event, its blocks free before the next step."""
        self._commands.put(lambda: self._abort(self._processor.cancel(request_id)))

    def drop(self, request_id: str) -> None:
        """Forget the request without a word: it belongs to another worker."""
        self._commands.put(lambda: self._abort(self._processor.drop(request_id)))

    def published(self) -> None:
        """One batch of publications has reached the broker."""
        self._unpublished.release()

    def stop(self) -> None:
        """End after the current step."""
        self._commands.put(None)

    # --- in the thread --------------------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            while self._obey():
                self._hand_out()  # what a command ended does not wait for a step
                if self._engine.has_work:
                    self._step()
                    self._hand_out()
        except BaseException as error:
            self._on_death(error)
        finally:
            self.pulse.rest()

    def _obey(self) -> bool:
        """Run all commands that wait; wait for one when there is nothing to compute. False: stop."""
        block = not self._engine.has_work
        if block:
            self.pulse.rest()
        while True:
            try:
                command = self._commands.get(block=block, timeout=IDLE_SECONDS)
            except queue.Empty:
                self.pulse.beat()
                return True
            self.pulse.beat()
            if command is None:
                return False
            command()
            block = False

    def _step(self) -> None:
        before, started = self._engine.scheduler.num_scheduled_tokens, time.perf_counter()
        outputs = self._engine.step()
        self._metrics.step_time.observe(time.perf_counter() - started)
        num_tokens = self._engine.scheduler.num_scheduled_tokens - before
        self._metrics.iteration_tokens.observe(num_tokens)
        num_sampled = sum(len(output.token_ids) for output in outputs)
        self._metrics.prefill_tokens.inc(num_tokens - sum(bool(output.token_ids) for output in outputs))
        self._metrics.decode_tokens.inc(num_sampled)
        work = self._processor.process(self._without_failed(outputs))
        self._abort(work.abort)
        for request in work.add:
            self._engine.add(request)

    def _add(self, claim: Claim, grammar: CompiledGrammar | None) -> None:
        """A request that does not fit this engine's context fails alone: it must not end the engine."""
        request_id = claim.submission.request_id
        self._abort(self._processor.drop(request_id))  # lost, and won again before that was noticed
        for request in self._processor.begin(claim, grammar):
            try:
                self._engine.add(request)
            except ValueError as error:
                failure = Error(message=f"{error}.", code=ContextLengthExceeded.code, status=400)
                self._abort(self._processor.fail(request_id, failure))
                return
            if request.constraint is not None:
                self._constraints[request.request_id] = request.constraint

    def _refuse(self, claim: Claim, error: Error | None) -> None:
        request_id = claim.submission.request_id
        self._abort(self._processor.drop(request_id))
        self._processor.begin(claim)
        if error is None:
            self._processor.cancel(request_id)
        else:
            self._processor.fail(request_id, error)

    def _without_failed(self, outputs: Sequence[StepOutput]) -> list[StepOutput]:
        """A grammar that cannot be followed any further ends its request with an error, whatever the step gave it."""
        failed = set()
        for engine_request_id, constraint in list(self._constraints.items()):
            if constraint.error:
                request_id, _ = split_engine_id(engine_request_id)
                failed.add(request_id)
                message = f"The grammar cannot be followed any further: {constraint.error}."
                failure = Error(message=message, code=InvalidGrammar.code, status=InvalidGrammar.status)
                self._abort([engine_request_id, *self._processor.fail(request_id, failure)])
        for output in outputs:
            if output.finish_reason is not None:
                self._constraints.pop(output.request_id, None)
        return [output for output in outputs if split_engine_id(output.request_id)[0] not in failed]

    def _abort(self, engine_ids: Sequence[str]) -> None:
        for engine_request_id in engine_ids:
            self._engine.abort(engine_request_id)
            self._constraints.pop(engine_request_id, None)

    def _hand_out(self) -> None:
        self._note_state()
        publications = self._processor.take_publications()
        if publications:
            self._await_broker()
            self._publish(publications)

    def _await_broker(self) -> None:
        if not self._unpublished.acquire(blocking=False):
            self.pulse.rest()
            self._unpublished.acquire()
            self.pulse.beat()

    def _note_state(self) -> None:
        scheduler = self._engine.scheduler
        self.progress.look(scheduler)
        self._num_turns += 1
        self.state = EngineState(
            self._num_turns,
            len(scheduler.running),
            len(scheduler.waiting),
            self._processor.num_choices,
            scheduler.block_pool.usage,
        )
        self._update_metrics()
        if not scheduler.has_work:
            scheduler.check_integrity()

    def _update_metrics(self) -> None:
        scheduler, metrics, state = self._engine.scheduler, self._metrics, self.state
        metrics.num_requests_running.set(state.num_running)
        metrics.num_requests_queued.set(state.num_waiting)
        metrics.kv_cache_usage.set(state.kv_cache_usage)
        counted = (
            scheduler.num_preemptions,
            scheduler.num_prefix_queries,
            scheduler.num_prefix_hits,
            scheduler.num_draft_tokens,
            scheduler.num_accepted_tokens,
        )
        counters = (
            metrics.num_preemptions,
            metrics.prefix_cache_queries,
            metrics.prefix_cache_hits,
            metrics.draft_tokens,
            metrics.accepted_tokens,
        )
        for counter, now, before in zip(counters, counted, self._counted, strict=True):
            counter.inc(now - before)
        self._counted = counted
