"""The emitted output of every request: appended by its owner only, once per index, and kept until the retention ends.

Event i of a request is entry ``i-0`` of its log, counted from 1. What a client saw is in the log before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from redis.asyncio import Redis

from tokenrelay.service.broker import broker_errors
from tokenrelay.service.errors import NotFoundError
from tokenrelay.service.keys import Keys
from tokenrelay.service.lua import Scripts, packed
from tokenrelay.service.messages import Event, Usage, decode_event, encode
from tokenrelay.service.settings import Settings


@dataclass(frozen=True, slots=True)
class Publication:
    """Events of one request, the first of them at ``index``, by the owner of ``epoch``."""

    request_id: str
    epoch: int
    index: int
    events: list[Event]


class Progress(NamedTuple):
    """Of a request that a worker holds under ``epoch``. ``running`` is false while it waits inside the engine."""

    epoch: int
    num_computed_prompt_tokens: int
    num_preemptions: int
    running: bool
    num_cached_prompt_tokens: int = 0  # of the computed ones: found in the prefix cache


class Tail(NamedTuple):
    """How far a log reaches, whether it is complete, and the seconds until the request's deadline, if it has one."""

    last: int
    finished: bool
    remaining: float | None = None


class TokenLog:
    """Write and read logs. Raises BrokerUnavailable when the broker is."""

    def __init__(self, redis: Redis, keys: Keys, settings: Settings) -> None:
        self._redis = redis
        self._keys = keys
        self._retention_ms = int(settings.retention_seconds * 1000)
        self._scripts = Scripts(redis, keys)

    async def publish(self, worker_id: str, publications: Sequence[Publication]) -> list[str]:
        """One engine step. Returns the ids refused: given to another worker meanwhile, or an index with a gap."""
        packed = encode([_pack(publication) for publication in publications])
        refused = await self._scripts.call("publish", [self._keys.leases], worker_id, packed)
        return [request_id.decode() for request_id in refused]

    async def finish(self, worker_id: str, publication: Publication, *, bury: str = "") -> bool:
        """The last events of a request; False if refused. ``bury`` says why it becomes a dead letter."""
        assert publication.events[-1].terminal, "the last event must be terminal"
        keys = [self._keys.leases, self._keys.dead]
        arguments = (encode(_pack(publication)), self._retention_ms, bury, _pack_usage(publication.events[-1].usage))
        return bool(await self._scripts.call("finish", keys, worker_id, *arguments))

    async def report(self, worker_id: str, progress: Mapping[str, Progress]) -> None:
        """What there is to tell of requests before their next event, by id. Of those that are lost it is ignored."""
        reports = [(request_id, *map(int, news)) for request_id, news in progress.items()]
        await self._scripts.call("report", [self._keys.leases], worker_id, encode(reports))

    @broker_errors()
    async def read(self, request_id: str, after: int = 0, *, limit: int | None = None) -> list[tuple[int, Event]]:
        """The events behind index ``after``. Raises NotFoundError for a request that is unknown or forgotten."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.exists(self._keys.request(request_id))
            pipeline.xrange(self._keys.log(request_id), min=f"({after}-0", count=limit)
            exists, entries = await pipeline.execute()
        if not exists:
            raise _unknown(request_id)
        return [(index_of(entry_id), decode_event(fields[b"e"])) for entry_id, fields in entries]

    async def follow(self, request_id: str, mailbox: str) -> Tail:
        """Send further events to this mailbox too. Raises NotFoundError like ``read``."""
        found = await self._scripts.call("follow", [self._keys.request(request_id)], request_id, mailbox)
        if found is None:
            raise _unknown(request_id)
        state, last, remaining_ms = found
        return Tail(last, state == b"finished", remaining_ms / 1000 if remaining_ms >= 0 else None)


def index_of(entry_id: bytes) -> int:
    """``b"7-0"`` → 7"""
    return int(entry_id.partition(b"-")[0])


def _pack(publication: Publication) -> tuple[Any, ...]:
    events = [packed(encode(event)) for event in publication.events]
    num_tokens = sum(len(event.token_ids) for event in publication.events)
    return publication.request_id, publication.epoch, publication.index, events, num_tokens


def _pack_usage(usage: Usage | None) -> bytes:
    return encode(usage and (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens))


def _unknown(request_id: str) -> NotFoundError:
    return NotFoundError(f"There is no request {request_id}, or its output is no longer kept.")
