"""Requests that no worker survived, or none could read: kept for a while, prompts included, to be looked at and sent
again. What the client got is an error event in the request's log."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote
from uuid import NAMESPACE_OID, uuid5

from msgspec.structs import replace
from redis.asyncio import Redis

from tokenrelay.service.broker import broker_errors
from tokenrelay.service.errors import NotFoundError
from tokenrelay.service.keys import Keys
from tokenrelay.service.messages import MessageError, Submission, decode_submission
from tokenrelay.service.queue import Queue
from tokenrelay.service.settings import Settings
from tokenrelay.service.terms import NO_TERMS, AnswerSpec, Terms, decode_answer_spec

T = TypeVar("T")


class DeadLetter(NamedTuple):
    """One of them. ``reason`` is ``worker_lost``, or what could not be read; ``attempts`` are workers that died in a
    row; ``num_events`` had been emitted before. What this version cannot read of it is None."""

    model: str
    entry_id: str
    request_id: str
    reason: str
    attempts: int
    num_events: int
    worker_id: str
    payload_bytes: int
    submission: Submission | None
    answer: AnswerSpec | None = None

    @property
    def died_at(self) -> datetime:
        return datetime.fromtimestamp(int(self.entry_id.partition("-")[0]) / 1000, UTC)


class DeadLetters:
    """Those of every model of one broker. Raises BrokerUnavailable when the broker is."""

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self._redis = redis
        self._settings = settings

    async def all(self) -> list[DeadLetter]:
        """By model, the oldest first."""
        async with broker_errors():
            return [letter async for key in self._streams() for letter in await self._read(key)]

    async def find(self, request_id: str) -> DeadLetter:
        """The latest of this request. Raises NotFoundError."""
        found = [letter for letter in await self.all() if letter.request_id == request_id]
        if not found:
            raise NotFoundError(f"There is no dead letter of a request {request_id}.")
        return found[-1]

    async def requeue(self, letter: DeadLetter) -> str:
        """Submit it again, from its beginning, under a new id, which is returned; and forget it.

        It has no deadline, and goes on whoever reads it. May be repeated: the new id follows from the letter. Raises
        MessageError for one that cannot be read, QueueFull or RateLimited.
        """
        if letter.submission is None:
            raise MessageError(f"{letter.request_id} cannot be sent again: {letter.reason}")
        new_id = uuid5(NAMESPACE_OID, letter.request_id + letter.entry_id).hex
        keys, again = Keys(letter.model), replace(letter.submission, request_id=new_id)
        await Queue(self._redis, keys, self._settings).submit(again, mailbox="", terms=_terms(letter))
        async with broker_errors():
            await self._redis.xdel(keys.dead, letter.entry_id)
        return new_id

    async def purge(self) -> int:
        """Forget all. Returns how many there were."""
        number = len(await self.all())
        async with broker_errors():
            async for key in self._streams():
                await self._redis.delete(key)
        return number

    async def _streams(self) -> AsyncIterator[bytes]:
        async for key in self._redis.scan_iter(match="tokenrelay:{*}:dead", count=1000, _type="stream"):
            yield key

    async def _read(self, key: bytes) -> list[DeadLetter]:
        model = unquote(key.decode().partition("{")[2].rpartition("}")[0])
        entries: Any = await self._redis.xrange(key)
        return [_letter(model, entry_id.decode(), fields) for entry_id, fields in entries]


def _letter(model: str, entry_id: str, fields: dict[bytes, bytes]) -> DeadLetter:
    return DeadLetter(
        model=model,
        entry_id=entry_id,
        request_id=fields[b"id"].decode(),
        reason=fields[b"reason"].decode(),
        attempts=int(fields[b"attempts"]),
        num_events=int(fields[b"num_events"]),
        worker_id=fields[b"owner"].decode(),
        payload_bytes=len(fields[b"payload"]),
        submission=_readable(decode_submission, fields[b"payload"]),
        answer=_readable(decode_answer_spec, fields[b"answer"]),
    )


def _readable(decode: Callable[[bytes], T], payload: bytes) -> T | None:
    try:
        return decode(payload)
    except MessageError:
        return None


def _terms(letter: DeadLetter) -> Terms:
    """Of a completion's several prompts, one died: it is a request of its own now."""
    if letter.answer is None:
        return NO_TERMS
    return Terms(answer=replace(letter.answer, prompt=0, num_prompts=1, on_disconnect="continue"))
