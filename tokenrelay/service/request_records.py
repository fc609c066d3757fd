"""What the broker remembers of a request beside its log: how it is answered, and what happened to it when.

All times are the broker's. A record lives as long as the request's log.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from redis.asyncio import Redis

from tokenrelay.service.broker import broker_errors
from tokenrelay.service.errors import NotFoundError
from tokenrelay.service.keys import Keys
from tokenrelay.service.messages import MessageError
from tokenrelay.service.terms import AnswerSpec, decode_answer_spec, part_ids

_FIELDS = ("answer", "state", "epoch", "attempts", "next", "computed", "deadline", "timeline")


class Moment(NamedTuple):
    """Something that happened: queued, claimed, first_token, preempted, resumed, requeued or finished.

    ``at`` is Unix time in seconds. A claim also tells the worker and the epoch it begins.
    """

    at: float
    event: str
    worker: str = ""
    epoch: int = 0


class Whole(NamedTuple):
    """One HTTP request: how it is answered (its first prompt), and the queued requests that do its work."""

    answer: AnswerSpec
    request_ids: list[str]


class RequestRecord(NamedTuple):
    """One queued request as it is now. ``position``: requests that will be claimed before it, while it waits.

    ``deadline`` is Unix time in seconds. ``last_index`` is that of its newest event.
    """

    request_id: str
    answer: AnswerSpec
    state: str  # waiting, running or finished
    position: int | None
    attempts: int
    epoch: int
    last_index: int
    num_computed_prompt_tokens: int
    deadline: float | None
    timeline: list[Moment]


class RequestRecords:
    """Reads records. Raises BrokerUnavailable when the broker is."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys

    async def answer(self, request_id: str) -> AnswerSpec:
        """How a queued request is answered. Raises NotFoundError."""
        async with broker_errors():
            encoded: Any = await self._redis.hget(self._keys.request(request_id), "answer")
        return _answer_spec(request_id, encoded)

    async def whole(self, relay_id: str, tenant: str) -> Whole:
        """What an HTTP request of a tenant consists of: one prompt has its id, several are numbered.

        Raises NotFoundError, for another tenant's as for one that never was.
        """
        try:
            answer = await self._owned_answer(relay_id, tenant)
        except NotFoundError:
            answer = await self._owned_answer(f"{relay_id}-0", tenant)
        return Whole(answer, part_ids(relay_id, answer.num_prompts))

    async def _owned_answer(self, request_id: str, tenant: str) -> AnswerSpec:
        async with broker_errors():
            found: Any = await self._redis.hmget(self._keys.request(request_id), "answer", "tenant")
        encoded, owner = found
        if owner != tenant.encode():
            raise _unknown(request_id)
        return _answer_spec(request_id, encoded)

    async def read(self, request_id: str) -> RequestRecord:
        """Raises NotFoundError for a request that is unknown or forgotten."""
        async with broker_errors(), self._redis.pipeline(transaction=True) as pipeline:
            pipeline.hmget(self._keys.request(request_id), *_FIELDS)
            pipeline.zrank(self._keys.waiting, request_id)
            values, position = await pipeline.execute()
        answer, state, epoch, attempts, upcoming, computed, deadline, timeline = values
        return RequestRecord(
            request_id,
            _answer_spec(request_id, answer),
            state.decode(),
            position,
            int(attempts),
            int(epoch),
            int(upcoming) - 1,
            int(computed or 0),
            int(deadline) / 1000 if deadline else None,
            [_moment(line) for line in reversed((timeline or b"").decode().splitlines())],
        )


def _answer_spec(request_id: str, encoded: bytes | None) -> AnswerSpec:
    try:
        return decode_answer_spec(encoded or b"")
    except MessageError:  # or of a process so old or new that it describes answers otherwise
        raise _unknown(request_id) from None


def _moment(line: str) -> Moment:
    """``1763790000123 claimed some-worker 1``"""
    milliseconds, event, *details = line.split(" ")
    at = int(milliseconds) / 1000
    return Moment(at, event, details[0], int(details[1])) if event == "claimed" else Moment(at, event)


def _unknown(request_id: str) -> NotFoundError:
    return NotFoundError(f"There is no request {request_id}, or its output is no longer kept.")
