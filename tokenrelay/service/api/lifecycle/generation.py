"""From a submission to its events: the part of a request's life in which the API owes it an end.

A client that goes away leaves a request behind. It is cancelled, unless it was to go on or somebody else reads it, and
followed to its terminal event in the background, so that outcomes always add up to what was accepted.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any, NoReturn, Self

from tokenrelay.model.sampling_params import FinishReason
from tokenrelay.service.allowance import Allowance
from tokenrelay.service.api.event_loop import race
from tokenrelay.service.api.lifecycle.accounting import RequestAccount
from tokenrelay.service.api.lifecycle.deadline import Deadline
from tokenrelay.service.errors import BrokerUnavailable, Cancelled, ServiceError, Unavailable
from tokenrelay.service.mailbox import Mailbox, Subscription
from tokenrelay.service.messages import Error, Event, Submission
from tokenrelay.service.metrics import ApiMetrics
from tokenrelay.service.queue import CancelOutcome, Queue
from tokenrelay.service.request_records import Moment, RequestRecords
from tokenrelay.service.terms import AnswerSpec, Terms

FAREWELL_SECONDS = 30.0  # how long a cancelled request's terminal event is waited for
RETURN_SECONDS = 30.0  # for a client to come back whose connection we closed
RETRY_SECONDS = 0.2
INTERRUPTED = "interrupted"  # outcome of a request that this process left to others when it stopped


class GenerationFailed(Exception):
    """An accepted request ended in ``error``."""

    def __init__(self, error: ServiceError) -> None:
        super().__init__(error.message)
        self.error = error


class Generation:
    """A reader of one queued request: an async iterator of (index, event) that ends after the terminal event.

    Raises GenerationFailed for an event that is an error or a cancellation. ``account`` is None if another process, or
    another connection, accepted the request; else ``allowance`` is what that left of the tenant's limits.
    """

    def __init__(
        self,
        request_id: str,
        answer: AnswerSpec,
        events: Subscription,
        deadline: Deadline,
        account: RequestAccount | None,
        allowance: Allowance | None = None,
    ) -> None:
        self.request_id = request_id
        self.answer = answer
        self.account = account
        self.allowance = allowance
        self.ended = False
        self._events = events
        self._deadline = deadline

    @property
    def relay_id(self) -> str:
        """Of the HTTP request that this is a part of."""
        return self.request_id if self.answer.num_prompts == 1 else self.request_id.rpartition("-")[0]

    def __aiter__(self) -> Self:
        return self

    @property
    def ready(self) -> bool:
        return self._events.ready

    async def __anext__(self) -> tuple[int, Event]:
        index, event = await self._next()
        if event.error:
            raise GenerationFailed(as_service_error(event.error))
        if event.finish_reason == FinishReason.CANCELLED:
            raise GenerationFailed(Cancelled("The request was cancelled."))
        return index, event

    async def finish(self) -> None:
        """Take the remaining events, whatever they are."""
        with suppress(StopAsyncIteration):
            while not self.ended:
                await self._next()

    def end(self, outcome: str) -> None:
        """Nothing more is expected of it. Its outcome is what was told first."""
        self.ended = True
        if self.account:
            self.account.end(outcome)

    async def unsubscribe(self) -> None:
        await self._events.__aexit__(None, None, None)

    async def _next(self) -> tuple[int, Event]:
        try:
            index, event = await (anext(self._events) if self.ready else self._deadline.next(self._events))
        except StopAsyncIteration:
            self.ended = True  # before this reader came
            raise
        except ServiceError as error:
            self.end(error.code)
            raise GenerationFailed(error) from error
        self.ended = event.terminal
        if self.account:
            self.account.note(event)
        return index, event


class Generations:
    """Starts, joins and sees off the requests that clients of this process read."""

    def __init__(
        self, queue: Queue, mailbox: Mailbox, records: RequestRecords, metrics: ApiMetrics, grace_seconds: float
    ) -> None:
        self._queue = queue
        self._mailbox = mailbox
        self._records = records
        self._metrics = metrics
        self._grace_seconds = grace_seconds
        self._num_readers: Counter[str] = Counter()  # by request: clients of this process
        self._interrupted = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()

    async def start(self, submission: Submission, terms: Terms) -> Generation:
        """Queue a request, or join the one that its idempotency key stands for.

        Raises what ``Queue.submit`` does; whoever gets a Generation must ``close`` it.
        """
        assert terms.answer, "a request from a client says how to answer it"
        events = self._mailbox.subscribe(submission.request_id)
        await events.__aenter__()  # before it is queued, or its first events could be missed
        try:
            submitted = await self._queue.submit(submission, mailbox=self._mailbox.name, terms=terms)
        except BaseException as error:
            await events.__aexit__(None, None, None)
            if not isinstance(error, ServiceError) or isinstance(error, BrokerUnavailable):
                self._in_background(self._withdraw(submission.request_id))  # it may have been queued all the same
            raise
        if not submitted.created:
            await events.__aexit__(None, None, None)
            return await self.join(submitted.request_id)
        account = RequestAccount(submission, self._metrics)
        deadline = Deadline(self._queue, submission.request_id, terms.timeout or None)
        name, answer = submission.request_id, terms.answer
        return self._read(Generation(name, answer, events, deadline, account, submitted.allowance))

    async def join(self, request_id: str, after: int = 0) -> Generation:
        """Read a request of any process behind an index, or from the beginning if its chunks look back; then follow it.

        Raises NotFoundError; whoever gets a Generation must ``close`` it.
        """
        answer = await self._records.answer(request_id)
        events = self._mailbox.subscribe(request_id, after=0 if answer.looks_back else after)
        await events.__aenter__()
        self._metrics.streams_joined.inc()
        deadline = Deadline(self._queue, request_id, events.remaining)
        return self._read(Generation(request_id, answer, events, deadline, None))

    async def timelines(self, request_ids: Sequence[str]) -> list[list[Moment]]:
        """What happened to these requests when. Raises NotFoundError, BrokerUnavailable."""
        return [(await self._records.read(request_id)).timeline for request_id in request_ids]

    async def close(self, generation: Generation, *, may_return: bool = False) -> None:
        """The client wants no more of it, or it ``may_return``. Does not wait: a request that has not ended is seen off
        in the background."""
        self._num_readers[generation.request_id] -= 1
        self._num_readers += Counter()  # forgets who has none
        if self._interrupted.is_set():
            generation.end(INTERRUPTED)
        if generation.ended:
            await generation.unsubscribe()
        else:
            self._in_background(self._see_off(generation, max(self._grace_seconds, RETURN_SECONDS * may_return)))

    def interrupt(self) -> None:
        """The drain is over: ends every stream of this process. The requests go on, readable elsewhere."""
        self._interrupted.set()

    async def interruption(self) -> NoReturn:
        await self._interrupted.wait()
        raise GenerationFailed(Unavailable("This server is stopping before the request was done; try again."))

    async def aclose(self, seconds: float) -> None:
        """Wait for the cancellations on their way. What goes on without a client is left to others."""
        self.interrupt()
        if self._background:
            await asyncio.wait(self._background, timeout=seconds)
        for task in self._background:
            task.cancel()

    def _read(self, generation: Generation) -> Generation:
        self._num_readers[generation.request_id] += 1
        return generation

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _see_off(self, generation: Generation, grace: float) -> None:
        """To its end, if it is this process that tells its outcome; a cancelled one is not waited for for ever."""
        outcome = INTERRUPTED
        try:
            with suppress(GenerationFailed):
                if await self._give_up(generation, grace):
                    outcome = FinishReason.CANCELLED
                    with suppress(TimeoutError):
                        async with asyncio.timeout(FAREWELL_SECONDS):
                            await generation.finish()
                elif generation.account:
                    await race(generation.finish(), self.interruption())
        finally:
            generation.end(outcome)
            await generation.unsubscribe()

    async def _give_up(self, generation: Generation, grace: float) -> bool:
        """Cancel it, if that is what its client's leaving means and nobody came (back) for it meanwhile."""
        if generation.answer.on_disconnect == "continue":
            return False
        if grace:
            with suppress(TimeoutError):
                async with asyncio.timeout(grace):
                    await generation.finish()
        if generation.ended or self._num_readers[generation.request_id]:
            return False
        outcome = CancelOutcome.UNKNOWN
        with suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_SECONDS):
                outcome = await self._cancel(generation.request_id, gone=self._mailbox.name)
        return outcome is not CancelOutcome.READ

    async def _withdraw(self, request_id: str) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_SECONDS):
                await self._cancel(request_id)

    async def _cancel(self, request_id: str, gone: str = "") -> CancelOutcome:
        """Patient: a cancellation lost in a broker's restart would leave a request that nobody reads."""
        while True:
            try:
                return await self._queue.cancel(request_id, gone=gone)
            except BrokerUnavailable:
                await asyncio.sleep(RETRY_SECONDS)


def as_service_error(error: Error) -> ServiceError:
    """The error of the tree with this code; one that a newer worker knows becomes a plain ServiceError."""
    kind = {known.code: known for known in _tree(ServiceError)}.get(error.code, ServiceError)
    return kind(error.message, code=error.code)


def _tree(root: type[ServiceError]) -> list[type[ServiceError]]:
    return [root, *(kind for child in root.__subclasses__() for kind in _tree(child))]
