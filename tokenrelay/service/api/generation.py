"""From a submission to its events: the part of a request's life in which the API owes it an end.

A client that goes away leaves a request behind. It is cancelled and followed to its terminal event in the
background, so that outcomes always add up to what was accepted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, NoReturn, Self

from tokenrelay.model.sampling_params import FinishReason
from tokenrelay.service.api.accounting import RequestAccount
from tokenrelay.service.errors import BrokerUnavailable, Cancelled, ServiceError, Unavailable
from tokenrelay.service.mailbox import Mailbox, Subscription
from tokenrelay.service.messages import Error, Event, Submission
from tokenrelay.service.metrics import ApiMetrics
from tokenrelay.service.queue import Queue

FAREWELL_SECONDS = 30.0  # how long a cancelled request's terminal event is waited for
RETRY_SECONDS = 0.2
INTERRUPTED = "interrupted"  # outcome of a request that this process left to others when it stopped


class GenerationFailed(Exception):
    """An accepted request ended in ``error``."""

    def __init__(self, error: ServiceError) -> None:
        super().__init__(error.message)
        self.error = error


class Generation:
    """One accepted request: an async iterator of (index, event) that ends after the terminal event.

    Raises GenerationFailed for an event that is an error or a cancellation.
    """

    def __init__(self, submission: Submission, events: Subscription, metrics: ApiMetrics) -> None:
        self.request_id = submission.request_id
        self.account = RequestAccount(submission, metrics)
        self._events = events

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, Event]:
        index, event = await self._next()
        if event.error:
            raise GenerationFailed(as_service_error(event.error))
        if event.finish_reason == FinishReason.CANCELLED:
            raise GenerationFailed(Cancelled("The request was cancelled."))
        return index, event

    async def finish(self) -> None:
        """Take the remaining events, whatever they are."""
        while not self.account.ended:
            await self._next()

    async def unsubscribe(self) -> None:
        await self._events.__aexit__(None, None, None)

    async def _next(self) -> tuple[int, Event]:
        try:
            index, event = await anext(self._events)
        except ServiceError as error:
            self.account.end(error.code)
            raise GenerationFailed(error) from error
        self.account.note(event)
        return index, event


class Generations:
    """Starts and sees off the requests of this process."""

    def __init__(self, queue: Queue, mailbox: Mailbox, metrics: ApiMetrics) -> None:
        self._queue = queue
        self._mailbox = mailbox
        self._metrics = metrics
        self._interrupted = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()

    async def start(self, submission: Submission) -> Generation:
        """Queue a request. Raises QueueFull or BrokerUnavailable; whoever gets a Generation must ``close`` it."""
        events = self._mailbox.subscribe(submission.request_id)
        await events.__aenter__()  # before it is queued, or its first events could be missed
        try:
            await self._queue.submit(submission, mailbox=self._mailbox.name)
        except BaseException as error:
            await events.__aexit__(None, None, None)
            if not isinstance(error, ServiceError) or isinstance(error, BrokerUnavailable):
                self._in_background(self._withdraw(submission.request_id))  # it may have been queued all the same
            raise
        return Generation(submission, events, self._metrics)

    async def close(self, generation: Generation) -> None:
        """The client wants no more of it. Does not wait: a request that has not ended is seen off in the background."""
        if self._interrupted.is_set():
            generation.account.end(INTERRUPTED)
        if generation.account.ended:
            await generation.unsubscribe()
        else:
            self._in_background(self._see_off(generation))

    def interrupt(self) -> None:
        """The drain is over: ends every stream of this process. The requests go on, readable elsewhere."""
        self._interrupted.set()

    async def interruption(self) -> NoReturn:
        await self._interrupted.wait()
        raise GenerationFailed(Unavailable("This server is stopping before the request was done; try again."))

    async def aclose(self, seconds: float) -> None:
        """Wait for what still runs in the background."""
        if self._background:
            await asyncio.wait(self._background, timeout=seconds)
        for task in self._background:
            task.cancel()

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _see_off(self, generation: Generation) -> None:
        try:
            with suppress(TimeoutError, GenerationFailed):
                async with asyncio.timeout(FAREWELL_SECONDS):
                    await self._cancel(generation.request_id)
                    await generation.finish()
        finally:
            generation.account.end(FinishReason.CANCELLED)
            await generation.unsubscribe()

    async def _withdraw(self, request_id: str) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_SECONDS):
                await self._cancel(request_id)

    async def _cancel(self, request_id: str) -> None:
        """Patient: a cancellation lost in a broker's restart would leave a request that nobody reads."""
        while True:
            try:
                await self._queue.cancel(request_id)
                return
            except BrokerUnavailable:
                await asyncio.sleep(RETRY_SECONDS)


def as_service_error(error: Error) -> ServiceError:
    """The error of the tree with this code; one that a newer worker knows becomes a plain ServiceError."""
    kind = {known.code: known for known in _tree(ServiceError)}.get(error.code, ServiceError)
    return kind(error.message, code=error.code)


def _tree(root: type[ServiceError]) -> list[type[ServiceError]]:
    return [root, *(kind for child in root.__subclasses__() for kind in _tree(child))]
