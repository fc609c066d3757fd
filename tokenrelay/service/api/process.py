"""The parts of one API process, wired together once, at its start."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import structlog

from tokenrelay.service.adapters import AdapterDirectory
from tokenrelay.service.api.access.keyring import Keyring
from tokenrelay.service.api.admission.admission import Admission
from tokenrelay.service.api.admission.structured import Grammars
from tokenrelay.service.api.catalogue import Catalogue
from tokenrelay.service.api.lifecycle.generation import Generations
from tokenrelay.service.api.operations.readiness import Readiness
from tokenrelay.service.api.responses.archive import ResponseArchive
from tokenrelay.service.api.responses.store import ResponseStore
from tokenrelay.service.api.served_model import ServedModel
from tokenrelay.service.api.streaming.queue_watch import QueueWatch
from tokenrelay.service.broker import connect
from tokenrelay.service.errors import BrokerUnavailable
from tokenrelay.service.keys import Keys
from tokenrelay.service.mailbox import Mailbox
from tokenrelay.service.messages import Adapter
from tokenrelay.service.metrics import ApiMetrics
from tokenrelay.service.queue import Queue
from tokenrelay.service.registry import Registry
from tokenrelay.service.request_records import RequestRecords
from tokenrelay.service.settings import Settings
from tokenrelay.service.token_log import TokenLog
from tokenrelay.service.usage import UsageLedger

FAREWELL_SECONDS = 3.0  # at exit, for cancellations that are still on their way

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class ApiProcess:
    settings: Settings
    model: ServedModel
    metrics: ApiMetrics
    adapters: AdapterDirectory
    catalogue: Catalogue
    admission: Admission
    queue: Queue
    generations: Generations
    records: RequestRecords
    usage: UsageLedger
    token_log: TokenLog
    responses: ResponseArchive
    readiness: Readiness
    watch: QueueWatch
    crippled: asyncio.Event = field(default_factory=asyncio.Event)  # a background task died: it can serve nobody

    def note_death(self, duty: asyncio.Task[None]) -> None:
        """A duty never ends by itself; if it does, that is a bug, and to go on without it would hide it."""
        log.critical("a background task died", exc_info=None if duty.cancelled() else duty.exception())
        self.crippled.set()


@asynccontextmanager
async def running(
    settings: Settings,
    model: ServedModel,
    metrics: ApiMetrics,
    keyring: Keyring,
    named_adapters: Mapping[str, Adapter],
) -> AsyncIterator[ApiProcess]:
    """An API process that listens to its mailbox. Needs no broker to start: it waits for one."""
    keys = Keys(model.name)
    url, ca_file = settings.redis_url, settings.redis_ca_file
    redis, blocking_redis = connect(url, ca_file=ca_file), connect(url, blocking=True, ca_file=ca_file)
    queue = Queue(redis, keys, settings)
    grammars = Grammars(model.tokenizer)
    adapters = AdapterDirectory(redis, keys, named_adapters)
    catalogue = Catalogue(model, adapters)
    records, token_log = RequestRecords(redis, keys), TokenLog(redis, keys, settings)
    mailbox = Mailbox(blocking_redis, redis, keys, token_log, f"api-{uuid.uuid4().hex}")
    process = ApiProcess(
        settings=settings,
        model=model,
        metrics=metrics,
        adapters=adapters,
        catalogue=catalogue,
        admission=Admission(model, catalogue, settings, grammars),
        queue=queue,
        generations=Generations(queue, mailbox, records, metrics, settings.disconnect_grace_seconds),
        records=records,
        usage=UsageLedger(redis, keys),
        token_log=token_log,
        responses=ResponseArchive(ResponseStore(redis, keys, settings), records, token_log, mailbox, model.tokenizer),
        readiness=Readiness(Registry(redis, keys, settings)),
        watch=QueueWatch(queue.load),
    )
    work = (mailbox.run(), process.watch.run(), keyring.run(), _refresh_gauges(process))
    duties = [asyncio.create_task(duty) for duty in work]
    for duty in duties:
        duty.add_done_callback(process.note_death)
    try:
        yield process
        await process.generations.aclose(FAREWELL_SECONDS)
        await process.responses.aclose()
    finally:
        for duty in duties:
            duty.remove_done_callback(process.note_death)
            duty.cancel()
        await asyncio.gather(*duties, return_exceptions=True)
        grammars.close()
        await redis.aclose()
        await blocking_redis.aclose()


async def _refresh_gauges(process: ApiProcess) -> None:
    while True:
        with suppress(BrokerUnavailable):
            process.metrics.note_load(await process.queue.load.read())
        await asyncio.sleep(process.settings.heartbeat_seconds)
