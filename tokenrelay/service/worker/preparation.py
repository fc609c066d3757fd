"""From a claim to the engine: first its grammar is compiled and its adapter loaded. That delays its own request only,
or those that need room for an adapter, too."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from tokenrelay.model.structured.compiler import CompiledGrammar, GrammarCompiler
from tokenrelay.model.structured.errors import GrammarError
from tokenrelay.model.weights.lora_config import LoRAError
from tokenrelay.service.errors import AdapterUnavailable, InvalidGrammar, ServiceError
from tokenrelay.service.messages import Adapter, Error
from tokenrelay.service.queue import Claim
from tokenrelay.service.worker.adapter_shelf import AdapterShelf
from tokenrelay.service.worker.engine_thread import EngineThread
from tokenrelay.service.worker.holdings import Holdings

log = structlog.get_logger()


class Preparations:
    """The claims that the engine does not know yet."""

    def __init__(
        self,
        engine: EngineThread,
        compiler: GrammarCompiler,
        shelf: AdapterShelf,
        held: Holdings,
        on_end: Callable[[asyncio.Task[None]], None],
    ) -> None:
        """``on_end``: of each preparation that takes a while."""
        self._engine, self._compiler, self._shelf, self._held = engine, compiler, shelf, held
        self._on_end = on_end
        self._claims: dict[str, Claim] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}  # by request

    def start(self, claim: Claim) -> None:
        submission = claim.submission
        if not (submission.params.grammar or submission.adapter):
            self._engine.add(claim)
            return
        task = asyncio.create_task(self._prepare(claim))
        self.tasks[submission.request_id] = task
        self._claims[submission.request_id] = claim
        task.add_done_callback(lambda task: self._forget(submission.request_id, task))
        task.add_done_callback(self._on_end)

    def cancel(self, request_id: str) -> bool:
        """End one of them as its client wishes. False: the engine has it, or nobody."""
        task = self.tasks.get(request_id)
        if task is None:
            return False
        task.cancel()
        self._end(self._claims[request_id], None)
        return True

    async def _prepare(self, claim: Claim) -> None:
        try:
            grammar = await self._compiled(claim.submission.params.grammar)
            if claim.submission.adapter:
                await self._take(claim.submission.adapter, claim)
        except ServiceError as error:
            self._end(claim, Error(message=error.message, code=error.code, status=error.status))
            return
        if self._is_held(claim):
            self._engine.add(claim, grammar)
        else:
            self._shelf.release((claim.submission.request_id, claim.epoch))

    async def _compiled(self, grammar: str) -> CompiledGrammar | None:
        try:
            return await asyncio.to_thread(self._compiler.compile, grammar) if grammar else None
        except GrammarError as error:
            raise InvalidGrammar(f"The grammar cannot be used: {error}.") from error

    async def _take(self, adapter: Adapter, claim: Claim) -> None:
        try:
            await self._shelf.take(adapter, (claim.submission.request_id, claim.epoch))
        except LoRAError as error:
            log.error("adapter not loaded", adapter=adapter.name, path=adapter.path, reason=str(error))
            raise AdapterUnavailable(
                f"The adapter '{adapter.name}' cannot be loaded where the request runs; the worker's log says why."
            ) from error

    def _end(self, claim: Claim, error: Error | None) -> None:
        if self._is_held(claim):
            self._engine.refuse(claim, error)

    def _is_held(self, claim: Claim) -> bool:
        """Or was it lost meanwhile?"""
        return self._held.epochs.get(claim.submission.request_id) == claim.epoch

    def _forget(self, request_id: str, task: asyncio.Task[None]) -> None:
        """Unless it is prepared again already, under a newer epoch."""
        if self.tasks.get(request_id) is task:
            del self.tasks[request_id], self._claims[request_id]
