"""Words the tests of the relay share: small requests and events."""

from __future__ import annotations

from typing import Any

from redis.asyncio import Redis

from tokenrelay.model.sampling_params import SamplingParams
from tokenrelay.service.keys import Keys
from tokenrelay.service.messages import Event, Submission, Usage
from tokenrelay.service.queue import Claim, Queue
from tokenrelay.service.token_log import Publication


def submission(request_id: str, *, max_tokens: int = 10, n: int = 1, **fields: Any) -> Submission:
    params = SamplingParams(max_tokens=max_tokens, n=n)
    return Submission(request_id=request_id, prompt_token_ids=[1, 2, 3], params=params, **fields)


def token(number: int) -> Event:
    return Event(token_ids=[number], text=f"{number} ")


def ending(completion_tokens: int = 0) -> Event:
    return Event(finish_reason="stop", usage=Usage(prompt_tokens=3, completion_tokens=completion_tokens))


async def submit(queue: Queue, *request_ids: str, **fields: Any) -> None:
    for request_id in request_ids:
        await queue.submit(submission(request_id, **fields), mailbox="api")


async def claim_one(queue: Queue, worker_id: str = "worker") -> Claim:
    [claim] = await queue.claim(worker_id, 1)
    return claim


async def claim_ids(queue: Queue, limit: int = 100, worker_id: str = "worker") -> list[str]:
    return [claim.submission.request_id for claim in await queue.claim(worker_id, limit)]


async def measured(redis: Redis, keys: Keys, tokens_per_second: float) -> None:
    """As if the queue had drained at this rate for a long time."""
    await redis.hset(keys.drain, mapping={"tokens": tokens_per_second * 60, "busy": 60_000})


async def nothing_ended_for(redis: Redis, keys: Keys, seconds: int) -> None:
    """As if what waits had begun to, or work had last ended, so long ago."""
    now, microseconds = await redis.time()
    await redis.hset(keys.drain, "since", (now - seconds) * 1000 + microseconds // 1000)


def publication(claim: Claim, index: int, *events: Event) -> Publication:
    return Publication(claim.submission.request_id, claim.epoch, index, list(events))
