"""Responses by their ids: made from their logs while these are all there is, and written down once they have ended.

Whoever sees the end writes: the process that accepted the response or, if that has died, the next one that is asked.
Until then the log is kept as long as the response would be, so nothing depends on any process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from tokenrelay.model.sampling_params import FinishReason
from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.service.api.event_loop import off_loop_if_large
from tokenrelay.service.api.lifecycle.choices import LARGE_LOGPROBS, lone_step
from tokenrelay.service.api.lifecycle.generation import as_service_error
from tokenrelay.service.api.responses.event_sequence import PREFIX, EventSequence
from tokenrelay.service.api.responses.store import ResponseStore, StoredResponse, unknown_response
from tokenrelay.service.errors import BrokerUnavailable, Cancelled, NotFoundError
from tokenrelay.service.mailbox import Mailbox
from tokenrelay.service.messages import Event
from tokenrelay.service.request_records import RequestRecord, RequestRecords
from tokenrelay.service.token_log import TokenLog

RETRY_SECONDS = 0.2


class ResponseArchive:
    """Raises BrokerUnavailable when the broker is, and NotFoundError for what is not kept (any more)."""

    def __init__(
        self,
        store: ResponseStore,
        records: RequestRecords,
        token_log: TokenLog,
        mailbox: Mailbox,
        tokenizer: Tokenizer,
    ) -> None:
        self.store = store
        self._records = records
        self._token_log = token_log
        self._mailbox = mailbox
        self._tokenizer = tokenizer
        self._background: set[asyncio.Task[None]] = set()

    async def response(self, relay_id: str, stored: StoredResponse) -> bytes:
        """As it is now, as JSON."""
        return stored.output or (await self._from_log(relay_id)).encode()

    def keep(self, relay_id: str) -> None:
        """Write it down as soon as it has ended."""
        task = asyncio.create_task(self._keep(relay_id))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def end(self, relay_id: str) -> None:
        """Wait for it."""
        async with self._mailbox.subscribe(relay_id, after=0) as events:
            async for _ in events:
                pass

    async def aclose(self) -> None:
        """What has not ended is left to others."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)

    async def _keep(self, relay_id: str) -> None:
        """Patient: what is not written down here takes more memory until somebody asks for it."""
        with suppress(NotFoundError):
            while True:
                try:
                    await self.end(relay_id)
                    await self._from_log(relay_id)
                    return
                except BrokerUnavailable:
                    await asyncio.sleep(RETRY_SECONDS)

    async def _from_log(self, relay_id: str) -> str:
        try:
            record = await self._records.read(relay_id)
            log = await self._token_log.read(relay_id)
        except NotFoundError:
            raise unknown_response() from None
        events = await off_loop_if_large(len(log), LARGE_LOGPROBS, lambda: replayed(record, log, self._tokenizer))
        response = events.response.model_dump_json(exclude_unset=True)
        if events.ended:
            await self.store.settle(relay_id, response)
        return response


def replayed(record: RequestRecord, log: Sequence[tuple[int, Event]], tokenizer: Tokenizer) -> EventSequence:
    """The events of a response up to now, and so the response."""
    events = EventSequence(record.answer, tokenizer, PREFIX + record.request_id)
    if record.state != "waiting":
        events.begin()
    for index, event in log:
        if event.error:
            events.fail(as_service_error(event.error))
        elif event.finish_reason == FinishReason.CANCELLED:
            events.fail(Cancelled("The response was cancelled."))
        else:
            events.step(lone_step(index, event))
    return events
