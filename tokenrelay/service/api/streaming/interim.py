"""What a stream says before its first text, if its client asked: the place in the queue, and the prompt's progress.

``event: queue`` is this server's own; ``prompt_progress`` is llama.cpp's. Both are chunks with an empty delta, since
openai's client takes every event for a chunk.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, Protocol

from tokenrelay.service.api.lifecycle.choices import Choices
from tokenrelay.service.api.schemas.interim import PromptProgress
from tokenrelay.service.api.streaming.queue_watch import QueueWatch
from tokenrelay.service.load import AtWork, Place, Whereabouts

Look = Mapping[str, Whereabouts]


class InterimFormat(Protocol):
    def interim(self, name: str | None, **fields: Any) -> bytes:
        """A chunk without text that has these fields, on the wire, where the protocol has a place for it.

        ``name`` is that of the event, if it has one.
        """


async def interim_frames(
    choices: Choices, interim_format: InterimFormat, watch: QueueWatch
) -> AsyncGenerator[bytes, None]:
    """At every look a frame, or nothing if there is no news. Does not end by itself."""
    last = None
    async with aclosing(watch.follow(choices.request_ids)) as looks:
        async for look in looks:
            news = _place(choices, look) or _progress(choices, look)
            yield _frame(interim_format, choices, news) if news and news != last else b""
            last = news


def _place(choices: Choices, look: Look) -> Place | None:
    """While every prompt waits, that of the foremost."""
    places = [where for where in look.values() if isinstance(where, Place)]
    if not choices.answers[0].include_queue or len(places) < len(choices.request_ids):
        return None
    position, estimated_wait = min(places)
    return Place(position, round(estimated_wait, 1) if math.isfinite(estimated_wait) else math.inf)


def _progress(choices: Choices, look: Look) -> AtWork | None:
    """Of all prompts together."""
    at_work = [where for where in look.values() if isinstance(where, AtWork)]
    if not choices.answers[0].return_progress or not at_work:
        return None
    return AtWork(
        sum(where.num_computed_prompt_tokens for where in at_work),
        sum(where.num_cached_prompt_tokens for where in at_work),
        max(where.seconds for where in at_work),
    )


def _frame(interim_format: InterimFormat, choices: Choices, news: Whereabouts) -> bytes:
    return interim_format.interim("queue" if isinstance(news, Place) else None, **_fields(choices, news))


def _fields(choices: Choices, news: Whereabouts) -> dict[str, Any]:
    if isinstance(news, Place):
        seconds = news.estimated_wait if math.isfinite(news.estimated_wait) else None
        return {"position": news.position, "estimated_wait_seconds": seconds}
    progress = PromptProgress(
        total=sum(answer.num_prompt_tokens for answer in choices.answers),
        cache=news.num_cached_prompt_tokens,
        processed=news.num_computed_prompt_tokens,
        time_ms=round(1000 * news.seconds),
    )
    return {"prompt_progress": progress}
