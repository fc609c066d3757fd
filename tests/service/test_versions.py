"""Processes of two versions side by side: what is newer is understood, or left alone for who understands it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis

from tests.service.relay import claim_ids, claim_one, ending, publication, submission, submit, token
from tokenrelay.service.keys import Keys
from tokenrelay.service.messages import (
    ADAPTER_VERSION,
    NEWEST,
    VERSION,
    Adapter,
    Delivery,
    Event,
    MessageError,
    Submission,
    WorkerFacts,
    decode_deliveries,
    decode_event,
    decode_facts,
    decode_submission,
    encode,
)
from tokenrelay.service.queue import Queue
from tokenrelay.service.registry import Registry
from tokenrelay.service.settings import Settings
from tokenrelay.service.terms import AnswerSpec, decode_answer_spec
from tokenrelay.service.token_log import TokenLog

FACTS = WorkerFacts(worker_id="w", model="m", max_model_len=1, step_counter=2, spare=True)
ANSWER = AnswerSpec(route="chat", model="m", created=1, num_prompt_tokens=3)


def newer(message: msgspec.Struct, **fields: Any) -> bytes:
    """As a later version would send it, with a field more."""
    return encode({**msgspec.msgpack.decode(encode(message)), "mood": "good", **fields})


def test_fields_of_a_newer_sender_are_ignored() -> None:
    assert decode_submission(newer(submission("a"))) == submission("a")
    assert decode_event(newer(token(1))) == token(1)
    assert decode_facts(newer(FACTS)) == FACTS
    assert decode_answer_spec(newer(ANSWER)) == ANSWER
    delivery = msgspec.msgpack.encode([["a", 1, msgspec.Raw(newer(token(1))), "and more"]])
    assert decode_deliveries(delivery) == [Delivery("a", 1, token(1))]


def test_parameters_of_a_newer_sender_are_ignored_too() -> None:
    fields = msgspec.msgpack.decode(encode(submission("a")))
    fields["params"]["mood"] = "good"
    assert decode_submission(encode(fields)) == submission("a")


@pytest.mark.parametrize("message", [submission("a"), ANSWER])
def test_the_version_travels_with_every_message(message: msgspec.Struct) -> None:
    """Left out as a default, a message of the next version would look like one of this."""
    assert msgspec.msgpack.decode(encode(message))["version"] == VERSION


def test_an_unknown_version_is_not_guessed_at() -> None:
    for version in (VERSION - 1, NEWEST + 1):
        with pytest.raises(MessageError, match=f"version {version}"):
            decode_submission(newer(submission("a"), version=version))
    with pytest.raises(MessageError, match=f"version {VERSION + 1}"):
        decode_answer_spec(newer(ANSWER, version=VERSION + 1))


ADAPTER = Adapter(name="sql", path="/adapters/sql", digest="0" * 64)


async def test_only_a_request_with_an_adapter_needs_a_worker_that_knows_of_adapters(
    queue: Queue, redis: Redis, keys: Keys
) -> None:
    """An older one would answer it without."""
    await submit(queue, "plain")
    await submit(queue, "adapted", adapter=ADAPTER, version=ADAPTER_VERSION)
    assert await redis.hget(keys.request("plain"), "version") == b"%d" % VERSION
    assert await redis.hget(keys.request("adapted"), "version") == b"%d" % ADAPTER_VERSION
    plain, adapted = await queue.claim("worker", 2)
    assert plain.submission.adapter is None
    assert adapted.submission.adapter == ADAPTER
    with pytest.raises(ValueError, match=f"of version {ADAPTER_VERSION}"):
        submission("adapted", adapter=ADAPTER)


async def submit_newer(queue: Queue, redis: Redis, keys: Keys, request_id: str) -> None:
    """As the API of the next version does."""
    await submit(queue, request_id)
    payload = newer(submission(request_id), version=NEWEST + 1)
    await redis.hset(keys.request(request_id), mapping={"version": NEWEST + 1, "payload": payload})


async def test_a_worker_leaves_what_it_cannot_read_untouched_for_another(
    queue: Queue, redis: Redis, keys: Keys, token_log: TokenLog
) -> None:
    await submit(queue, "first")
    await submit_newer(queue, redis, keys, "newer")
    await submit(queue, "last")
    assert await claim_ids(queue) == ["first", "last"]
    assert await claim_ids(queue) == []
    assert await queue.position("newer") == 0
    assert await token_log.read("newer") == []
    assert await redis.hmget(keys.request("newer"), "state", "epoch", "attempts") == [b"waiting", b"0", b"0"]


async def test_an_older_api_can_still_cancel_it(queue: Queue, redis: Redis, keys: Keys, token_log: TokenLog) -> None:
    await submit_newer(queue, redis, keys, "newer")
    assert await queue.cancel("newer") == "waiting"
    [(_, event)] = await token_log.read("newer")
    assert event.finish_reason == "cancelled"


class NewerEvent(Event, frozen=True, kw_only=True, omit_defaults=True):
    mood: str = ""


async def test_a_request_begun_by_a_newer_worker_is_continued(queue: Queue, token_log: TokenLog) -> None:
    """Its log has fields that this version does not know."""
    await submit(queue, "a")
    claim = await claim_one(queue, "newer")
    await token_log.publish("newer", [publication(claim, 1, NewerEvent(token_ids=[1], text="1 ", mood="good"))])
    await queue.evict("newer")
    again = await claim_one(queue, "older")
    assert again.log == [token(1)]
    assert await token_log.finish("older", publication(again, 2, ending(1)))


async def test_workers_say_what_they_speak(redis: Redis, keys: Keys, settings: Settings) -> None:
    registry = Registry(redis, keys, settings)
    await registry.announce(FACTS)
    [facts] = await registry.workers()
    assert facts.protocol == NEWEST
    raw: Any = await redis.get(keys.worker("w"))
    assert msgspec.msgpack.decode(raw)["protocol"] == NEWEST
    await redis.set(keys.worker("w"), newer(FACTS, protocol=NEWEST + 1), keepttl=True)
    assert [facts.protocol for facts in await registry.workers()] == [NEWEST + 1]


def test_what_an_older_sender_does_not_know_has_a_default() -> None:
    """A field that had none would end every request that waits while a new version is rolled out."""
    oldest = {"request_id": "r", "prompt_token_ids": [1], "params": {"max_tokens": 3}, "version": VERSION}
    params = submission("r", max_tokens=3).params
    assert decode_submission(encode(oldest)) == Submission(request_id="r", prompt_token_ids=[1], params=params)
