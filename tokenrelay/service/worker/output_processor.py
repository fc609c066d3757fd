"""From sampled ids to log events: text, stop strings, finish reasons, usage.

Pure computation in the engine's thread, so that a stop string ends generation before another token is computed.
All of its state can be rebuilt from the events already in the log: that is how a request is resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import msgspec

from tokenrelay.model.engine.request import Request
from tokenrelay.model.engine.scheduler import StepOutput
from tokenrelay.model.sampling_params import MAX_SEED, FinishReason, SamplingParams
from tokenrelay.model.tokenizer import IncrementalDetokenizer, Tokenizer
from tokenrelay.service.messages import Error, Event, Submission, Usage
from tokenrelay.service.queue import Claim
from tokenrelay.service.token_log import Publication
from tokenrelay.service.worker.stop_strings import Matched, StopStringMatcher


class _Choice:
    """One of a request's n continuations: its ids so far, and the text not yet shown."""

    def __init__(self, index: int, params: SamplingParams, prompt_tail: list[int], tokenizer: Tokenizer) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self._params = params
        self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_tail)
        self._matcher = StopStringMatcher(params.stop)

    def append(self, token_id: int, finish_reason: FinishReason | None) -> Event:
        """The event for one more token. ``finish_reason`` on it is final: the engine's, or a stop string's."""
        self.token_ids.append(token_id)
        matched = self._text(token_id, finish_reason)
        self.finish_reason = FinishReason.STOP if matched.stopped else finish_reason
        return Event(choice=self.index, token_ids=[token_id], text=matched.text, finish_reason=self.finish_reason)

    def _text(self, token_id: int, finish_reason: FinishReason | None) -> Matched:
        # the token that stops is not text; what was incomplete before it is shown as it is
        text = "" if finish_reason is FinishReason.STOP else self._detokenizer.append([token_id])
        if finish_reason is not None:
            text += self._detokenizer.flush()
        if len(self.token_ids) < self._params.min_tokens:
            return Matched(text, False)
        matched = self._matcher.append(text)
        if finish_reason is not None and not matched.stopped:
            return Matched(matched.text + self._matcher.flush(), False)
        return matched

    def replay(self, event: Event) -> None:
        """Take over what another worker emitted; its text is already in the log."""
        for token_id in event.token_ids:
            self.append(token_id, None)
        self.finish_reason = event.finish_reason


@dataclass(slots=True)
class _Running:
    """A claimed request."""

    submission: Submission
    epoch: int
    next_index: int
    choices: list[_Choice]
    cached_tokens: int = 0
    events: list[Event] = field(default_factory=list)  # of this step

    @property
    def finished(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.submission.prompt_token_ids),
            completion_tokens=sum(len(choice.token_ids) for choice in self.choices),
            cached_tokens=self.cached_tokens,
        )


class OutputProcessor:
    """Holds every claimed request of this worker."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._running: dict[str, _Running] = {}

    @property
    def num_choices(self) -> int:
        """Sequences that are still being generated."""
        return sum(c.finish_reason is None for running in self._running.values() for c in running.choices)

    def begin(self, claim: Claim) -> list[Request]:
        """The engine requests of a claim: one per choice that the log does not show as ended."""
        submission = claim.submission
        params = submission.params
        choices = [
            _Choice(index, params, submission.prompt_token_ids[-4:], self._tokenizer) for index in range(params.n)
        ]
        for event in claim.log:
            choices[event.choice].replay(event)
        self._running[submission.request_id] = _Running(
            submission, claim.epoch, next_index=len(claim.log) + 1, choices=choices
        )
        return [_engine_request(submission, choice) for choice in choices if choice.finish_reason is None]

    def process(self, outputs: Iterable[StepOutput]) -> list[str]:
        """Turn a step's tokens into events. Returns engine ids to abort: their text hit a stop string."""
        stopped = []
        for output in outputs:
            request_id, choice_index = split_engine_id(output.request_id)
            running = self._running[request_id]
            running.cached_tokens = max(running.cached_tokens, output.num_cached_tokens)
            event = running.choices[choice_index].append(output.token_id, output.finish_reason)
            running.events.append(event)
            if event.finish_reason is not None and output.finish_reason is None:
                stopped.append(output.request_id)
        return stopped

    def cancel(self, request_id: str) -> list[str]:
        """End a request early. Returns the engine ids to abort."""
        running = self._running.get(request_id)
        if running is None:
            return []
        open_choices = [choice for choice in running.choices if choice.finish_reason is None]
        for choice in open_choices:
            choice.finish_reason = FinishReason.CANCELLED
            running.events.append(Event(choice=choice.index, finish_reason=FinishReason.CANCELLED))
        return [engine_id(request_id, choice.index) for choice in open_choices]

    def fail(self, request_id: str, error: Error) -> list[str]:
        """End a request with an error. Returns the engine ids to abort."""
        engine_ids = self.cancel(request_id)
        if request_id in self._running:
            self._running[request_id].events = [Event(error=error)]
        return engine_ids

    def drop(self, request_id: str) -> list[str]:
        """Forget a request that another worker owns now. Returns the engine ids to abort."""
        running = self._running.pop(request_id, None)
        return [engine_id(request_id, choice.index) for choice in running.choices] if running else []

    def take_publications(self) -> list[Publication]:
        """Everything not yet published; a request that ended closes with its terminal event and is forgotten."""
        publications = []
        for request_id, running in list(self._running.items()):
            if running.finished:
                _close(running)
                del self._running[request_id]
            if running.events:
                publications.append(Publication(request_id, running.epoch, running.next_index, running.events))
                running.next_index += len(running.events)
                running.events = []
        return publications


def _close(running: _Running) -> None:
    """Mark the last event as terminal; a request resumed after its last token gets one of its own."""
    running.events = running.events or [Event()]
    if not running.events[-1].terminal:
        running.events[-1] = msgspec.structs.replace(running.events[-1], usage=running.usage)


def engine_id(request_id: str, choice: int) -> str:
    return f"{request_id}/{choice}"


def split_engine_id(engine_request_id: str) -> tuple[str, int]:
    request_id, _, choice = engine_request_id.rpartition("/")
    return request_id, int(choice)


def _engine_request(submission: Submission, choice: _Choice) -> Request:
    params = replace(submission.params, n=1, seed=choice_seed(submission.params.seed, choice.index))
    return Request(
        engine_id(submission.request_id, choice.index),
        submission.prompt_token_ids,
        params,
        output_token_ids=choice.token_ids,
        cache_salt=submission.cache_salt,
    )


def choice_seed(seed: int, choice: int) -> int:
    """Choice 0 keeps the request's seed; the others get independent ones, the same on every worker."""
    if choice == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{choice}".encode()).digest()
    return int.from_bytes(digest[:8], "big") & MAX_SEED
