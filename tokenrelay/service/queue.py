"""Requests between their submission and their end: who waits, who works on what, who was given up.

Every step is one script and may be repeated; times are the broker's. A request is executed at least once: the fence of
owner and epoch makes what its client sees happen exactly once.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from enum import StrEnum
from typing import NamedTuple, cast

from redis.asyncio import Redis

from tokenrelay.model.sampling_params import FinishReason
from tokenrelay.service.allowance import Allowance
from tokenrelay.service.broker import BLOCK_SECONDS, broker_errors
from tokenrelay.service.errors import (
    BrokerUnavailable,
    DeadlineExceeded,
    IdempotencyKeyReused,
    ServiceError,
    WorkerLost,
)
from tokenrelay.service.keys import Keys
from tokenrelay.service.load import QueueLoad
from tokenrelay.service.lua import Scripts, packed
from tokenrelay.service.messages import (
    Error,
    Event,
    MessageError,
    Submission,
    Usage,
    decode_event,
    decode_submission,
    encode,
)
from tokenrelay.service.settings import Settings
from tokenrelay.service.terms import NO_TERMS, Terms
from tokenrelay.service.token_log import Publication, TokenLog

RECLAIM_BATCH = 64  # leases per call: meanwhile the broker serves nobody else
RECONNECT_SECONDS = 0.2


class Submitted(NamedTuple):
    """Where a request is: at its position in the queue (0 also if it has left it).

    ``created`` is false if an earlier submission had the same id or idempotency key: ``request_id`` is that one's.
    ``allowance`` is what it left of the tenant's limits.
    """

    position: int
    created: bool
    request_id: str
    allowance: Allowance | None = None


class Claim(NamedTuple):
    """A request to work on. Its next index is ``len(log) + 1``."""

    submission: Submission
    epoch: int
    attempts: int
    log: list[Event]
    queued_seconds: float


class CancelOutcome(StrEnum):
    """What the request was when it was cancelled."""

    WAITING = "waiting"  # its terminal event is written
    RUNNING = "running"  # its worker was told
    FINISHED = "finished"
    UNKNOWN = "unknown"
    READ = "read"  # elsewhere, so it goes on


class Renewal(NamedTuple):
    """What a worker must drop, and what it must end."""

    lost: list[str]
    cancelled: list[str]


class _Leased(NamedTuple):
    """One element of what claim.lua returns."""

    id: bytes
    epoch: int
    attempts: int
    payload: bytes
    waited_ms: int
    cancelled: int
    entries: list[tuple[bytes, list[bytes]]]

    def log(self) -> list[Event]:
        return [decode_event(encoded) for _, (_, encoded) in self.entries]

    def claim(self) -> Claim:
        submission = decode_submission(self.payload)
        return Claim(submission, self.epoch, self.attempts, self.log(), self.waited_ms / 1000)


class Queue:
    """The queue of one model. Raises BrokerUnavailable when the broker is."""

    def __init__(self, redis: Redis, keys: Keys, settings: Settings) -> None:
        self._redis = redis
        self._keys = keys
        self._scripts = Scripts(redis, keys)
        self._token_log = TokenLog(redis, keys, settings)
        self.load = QueueLoad(redis, keys, settings)
        self._max_attempts = settings.max_attempts
        self._lease_ms = int(settings.lease_seconds * 1000)
        self._retention_ms = int(settings.retention_seconds * 1000)
        self._claiming = asyncio.Lock()
        self._claim_token = uuid.uuid4().hex

    async def submit(self, submission: Submission, *, mailbox: str, terms: Terms = NO_TERMS) -> Submitted:
        """Accept a request, once per id and idempotency key. Raises QueueFull, RateLimited or
        IdempotencyKeyReused."""
        keys = self._keys
        request, key = keys.request(submission.request_id), terms.idempotency_key
        repeat = keys.idempotency(submission.tenant, key) if key else request
        reply = await self._scripts.call(
            "submit",
            [request, keys.waiting, keys.leases, keys.fair, repeat],
            *(submission.request_id, encode(submission), mailbox, submission.tenant),
            encode((submission.cost, submission.turn, len(submission.prompt_token_ids), submission.version)),
            *(submission.priority, self.load.limits, terms.encoded),
        )
        match reply:
            case [b"mismatch", *_]:
                raise IdempotencyKeyReused(
                    "This Idempotency-Key stands for another request; use a new key for this body."
                )
            case [b"refused", *_]:
                raise self.load.refusal(reply)
            case [b"limited", reason, wait_ms, left]:
                raise Allowance.read(terms.limits, left).refusal(reason, wait_ms, submission.cost)
        status, position, request_id, *left = reply
        allowance = Allowance.read(terms.limits, left[0]) if left else None
        return Submitted(position, status == b"created", request_id.decode(), allowance)

    async def claim(self, worker_id: str, limit: int, *, unsuspected: bool = True) -> list[Claim]:
        """Lease up to ``limit`` requests, in the queue's order. Those that need no work are ended on the way.

        One on its last attempt comes alone, and only if the worker is ``unsuspected``: if all it holds made progress.
        """
        keys = [self._keys.waiting, self._keys.leases, self._keys.fair, self._keys.claim(worker_id)]
        async with self._claiming:
            arguments = (limit, self._lease_ms, self._claim_token, self._max_attempts, int(unsuspected))
            reply = await self._scripts.call("claim", keys, worker_id, *arguments)
            claims = [await self._open(worker_id, _Leased(*fields)) for fields in reply]
            self._claim_token = uuid.uuid4().hex  # only now: after a failure the same requests must be found again
        return [claim for claim in claims if claim]

    async def renew(self, worker_id: str, held: Mapping[str, int]) -> Renewal:
        """Extend the leases of ``held``: request id → epoch."""
        packed = encode(list(held.items()))
        lost, cancelled = await self._scripts.call("renew", [self._keys.leases], worker_id, self._lease_ms, packed)
        return Renewal([name.decode() for name in lost], [name.decode() for name in cancelled])

    async def reclaim(self) -> list[str]:
        """Take the requests of silent workers from them. Returns their ids: waiting again, or dead letters."""
        ending = encode(_failure(WorkerLost(f"The request was lost with its worker {self._max_attempts} times.")))
        keys = [self._keys.leases, self._keys.waiting, self._keys.dead]
        arguments = (RECLAIM_BATCH, self._max_attempts, ending, self._retention_ms)
        reclaimed: list[str] = []
        examined = RECLAIM_BATCH
        while examined == RECLAIM_BATCH:
            examined, names = await self._scripts.call("reclaim", keys, *arguments)
            reclaimed += [name.decode() for name in names]
        return reclaimed

    async def evict(self, worker_id: str) -> list[str]:
        """Reclaim at once from a worker that is known to be dead: its leases need not run out. The fence holds anyway.

        Returns the ids reclaimed.
        """
        keys = [self._keys.leases, self._keys.workers, self._keys.worker(worker_id), self._keys.claim(worker_id)]
        await self._scripts.call("evict", keys, worker_id)
        return await self.reclaim()

    async def release(self, worker_id: str, request_id: str, epoch: int) -> None:
        """Hand a request back, with its log, to whoever claims next. Does not count as an attempt."""
        await self._scripts.call("release", [self._keys.leases, self._keys.waiting], worker_id, request_id, epoch)

    async def cancel(self, request_id: str, *, gone: str = "") -> CancelOutcome:
        """End a waiting request, or tell the worker of a running one. May be repeated.

        ``gone`` names the mailbox of an API process whose readers have left: if another's still read, nothing happens.
        """
        keys = [self._keys.waiting, self._keys.leases]
        next_index, events = 0, list[Event]()
        while True:
            ending = encode([packed(encode(event)) for event in events])
            arguments = (request_id, next_index, ending, self._retention_ms, gone)
            outcome = await self._scripts.call("cancel", keys, *arguments)
            if outcome != b"changed":
                return CancelOutcome(outcome.decode())
            next_index, events = await self._cancellation(request_id)

    async def expire(self, request_id: str = "") -> float | None:
        """End whatever is past its deadline. Returns the seconds that this request has left, if it has a deadline."""
        late = encode(_failure(DeadlineExceeded("The request was not done before its deadline.")))
        keys = [self._keys.waiting, self._keys.leases]
        remaining_ms = await self._scripts.call("expire", keys, request_id, late, self._retention_ms)
        return remaining_ms / 1000 if remaining_ms >= 0 else None

    @broker_errors()
    async def num_waiting(self) -> int:
        return int(await self._redis.zcard(self._keys.waiting))

    @broker_errors()
    async def position(self, request_id: str) -> int | None:
        """Requests that will be claimed before this one; None if it is not waiting."""
        return cast(int | None, await self._redis.zrank(self._keys.waiting, request_id))

    async def wakeups(self) -> AsyncGenerator[str, None]:
        """``submit``, ``cancel <id>`` and ``drop <id>`` as they happen. May lose some: claim and renew tell later."""
        while True:
            with suppress(BrokerUnavailable):
                async for message in self._listen():
                    yield message
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _listen(self) -> AsyncGenerator[str, None]:
        async with self._redis.pubsub(ignore_subscribe_messages=True) as channel:
            async with broker_errors():
                await channel.subscribe(self._keys.wakeup)
            yield "submit"  # whatever was said while nobody listened
            while True:
                async with broker_errors():
                    message = await channel.get_message(timeout=BLOCK_SECONDS)
                if message:
                    yield message["data"].decode()

    async def _open(self, worker_id: str, leased: _Leased) -> Claim | None:
        """The claim of a leased request; or None after ending one that was cancelled or cannot be read."""
        try:
            claim = leased.claim()
        except MessageError as error:
            unreadable = ServiceError("The request reached a worker that cannot read it.", code="unreadable_request")
            await self._end(worker_id, leased, [_failure(unreadable)], bury=str(error))
            return None
        if leased.cancelled:
            await self._end(worker_id, leased, cancellation(claim.submission, claim.log))
            return None
        return claim

    async def _end(self, worker_id: str, leased: _Leased, events: list[Event], bury: str = "") -> None:
        ending = Publication(leased.id.decode(), leased.epoch, len(leased.entries) + 1, events)
        await self._token_log.finish(worker_id, ending, bury=bury)

    async def _cancellation(self, request_id: str) -> tuple[int, list[Event]]:
        """The next index of a waiting request, and the events that end it there."""
        async with broker_errors(), self._redis.pipeline(transaction=False) as pipeline:
            pipeline.hget(self._keys.request(request_id), "payload")
            pipeline.xrange(self._keys.log(request_id))
            payload, entries = await pipeline.execute()
        try:
            log = [decode_event(fields[b"e"]) for _, fields in entries]
            events = cancellation(decode_submission(payload or b""), log)
        except MessageError:
            events = [Event(finish_reason=FinishReason.CANCELLED, usage=Usage(prompt_tokens=0, completion_tokens=0))]
        return len(entries) + 1, events


def cancellation(submission: Submission, log: list[Event]) -> list[Event]:
    """The events that end a request as cancelled after ``log``: one per unfinished choice, the last is terminal."""
    completed = sum(len(event.token_ids) for event in log)
    usage = Usage(prompt_tokens=len(submission.prompt_token_ids), completion_tokens=completed)
    ended = {event.choice for event in log if event.finish_reason}
    *others, last = [choice for choice in range(submission.params.n) if choice not in ended] or [0]
    events = [Event(choice=choice, finish_reason=FinishReason.CANCELLED) for choice in others]
    return [*events, Event(choice=last, finish_reason=FinishReason.CANCELLED, usage=usage)]


def _failure(error: ServiceError) -> Event:
    return Event(error=Error(message=error.message, code=error.code, status=error.status))
