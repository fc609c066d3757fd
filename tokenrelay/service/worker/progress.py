"""What a worker tells of prompts in progress and of preemptions: looked up some times a second, sent if it is news."""

from __future__ import annotations

import time
from collections.abc import Mapping

from tokenrelay.model.engine.request import Request
from tokenrelay.model.engine.scheduler import Scheduler
from tokenrelay.service.token_log import Progress
from tokenrelay.service.worker.output_processor import split_engine_id

LOOK_SECONDS = 0.25


class ProgressMeter:
    """``look`` belongs to the engine's thread, ``news`` to the event loop; in between is one assignment."""

    def __init__(self) -> None:
        self._latest: dict[str, Progress] = {}
        self._told: dict[str, Progress] = {}
        self._next_look = 0.0

    def look(self, scheduler: Scheduler) -> None:
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_SECONDS
            self._latest = _progress(scheduler)

    def news(self, epochs: Mapping[str, int]) -> dict[str, Progress]:
        """What changed since the last call, of requests that are held under these epochs."""
        current = {
            request_id: progress._replace(epoch=epochs[request_id])
            for request_id, progress in self._latest.items()
            if request_id in epochs
        }
        news = {name: progress for name, progress in current.items() if self._told.get(name) != progress}
        self._told = current
        return news


def _progress(scheduler: Scheduler) -> dict[str, Progress]:
    """By request id. A request whose tokens are in the log has nothing to tell, unless it was preempted."""
    running = {request.request_id for request in scheduler.running}
    found: dict[str, Progress] = {}
    for engine_request_id, request in scheduler.requests.items():
        if request.num_output_tokens == 0 or request.num_preemptions:
            request_id, _ = split_engine_id(engine_request_id)
            progress = _of(request, engine_request_id in running)
            found[request_id] = _furthest(found.get(request_id, progress), progress)
    return found


def _of(request: Request, running: bool) -> Progress:
    num_computed = min(request.num_computed_tokens, request.num_prompt_tokens)
    return Progress(0, num_computed, request.num_preemptions, running, request.num_cached_tokens)


def _furthest(one: Progress, other: Progress) -> Progress:
    """Of two choices of a request: the prompt is the same for both."""
    return Progress(
        0,
        max(one.num_computed_prompt_tokens, other.num_computed_prompt_tokens),
        max(one.num_preemptions, other.num_preemptions),
        one.running or other.running,
        max(one.num_cached_prompt_tokens, other.num_cached_prompt_tokens),
    )
