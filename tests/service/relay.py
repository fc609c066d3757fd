"""Words the tests of the relay share: small requests and events."""

from __future__ import annotations

from typing import Any

from tokenrelay.model.sampling_params import SamplingParams
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


def publication(claim: Claim, index: int, *events: Event) -> Publication:
    return Publication(claim.submission.request_id, claim.epoch, index, list(events))
