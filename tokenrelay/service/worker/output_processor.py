"""From sampled ids to log events: text, stop strings, finish reasons, usage.

Pure computation in the engine's thread, so that a stop string ends generation before another token is computed.
All of its state can be rebuilt from the events already in the log: that is how a request is resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from tokenrelay.model.detokenizer import IncrementalDetokenizer, TokenBytes
from tokenrelay.model.engine.request import Request
from tokenrelay.model.engine.step import StepOutput
from tokenrelay.model.sampling_params import MAX_SEED, FinishReason
from tokenrelay.service.messages import Error, Event, Submission, Usage
from tokenrelay.service.queue import Claim
from tokenrelay.service.token_log import Publication
from tokenrelay.service.worker.stop_strings import StopStringMatcher


class _Choice:
    """One of a request's n continuations: its ids so far, and the text not yet shown."""

    def __init__(self, index: int, submission: Submission, tokenizer: TokenBytes) -> None:
        params = submission.params
        self.index = index
        self.token_ids: list[int] = []
        self.mirostat_mu: float | None = None
        self.finish_reason: str | None = None
        self._submission = submission
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, submission.prompt_tail, skip_special_tokens=submission.skip_special_tokens
        )
        self._matcher = StopStringMatcher(params.stop, include=params.include_stop_str_in_output)

    @property
    def untouched(self) -> bool:
        """Nothing has come of it yet."""
        return not self.token_ids and self.finish_reason is None

    def extend(self, output: StepOutput) -> Event:
        """The event of a step. The token that ends the choice is the last, whatever was computed behind it."""
        if self._submission.prompt_only:
            self.finish_reason = FinishReason.LENGTH
            return Event(
                choice=self.index, prompt_logprobs=list(output.prompt_logprobs), finish_reason=self.finish_reason
            )
        num_before = len(self.token_ids)
        text = self._append_all(output.token_ids, output.finish_reason)
        token_ids = self.token_ids[num_before:]
        return Event(
            choice=self.index,
            token_ids=token_ids,
            text=text,
            logprobs=list(output.logprobs[: len(token_ids)]),
            prompt_logprobs=list(output.prompt_logprobs),
            mirostat_mu=output.mirostat_mu,
            finish_reason=self.finish_reason,
        )

    def replay(self, event: Event) -> None:
        """Take over what another worker emitted; its text is already in the log."""
        for token_id in event.token_ids:
            self._append(token_id, None)
        if event.mirostat_mu is not None:
            self.mirostat_mu = event.mirostat_mu
        self.finish_reason = event.finish_reason

    def _append_all(self, token_ids: Sequence[int], finish_reason: FinishReason | None) -> str:
        """One by one, so that several at once give the text that they would give alone."""
        text = ""
        for i, token_id in enumerate(token_ids, 1):
            text += self._append(token_id, finish_reason if i == len(token_ids) else None)
            if self.finish_reason is not None:
                break
        return text

    def _append(self, token_id: int, finish_reason: FinishReason | None) -> str:
        """What may be shown now. ``finish_reason`` on it is final: the engine's, or a stop string's."""
        self.token_ids.append(token_id)
        may_stop = len(self.token_ids) >= self._submission.params.min_tokens
        matched = self._matcher.append(self._decode(token_id, finish_reason), may_stop=may_stop)
        self.finish_reason = FinishReason.STOP if matched.stopped else finish_reason
        if finish_reason is None or matched.stopped:
            return matched.text
        return matched.text + self._matcher.flush()

    def _decode(self, token_id: int, finish_reason: FinishReason | None) -> str:
        """A token that stops is not text, unless asked for; what was incomplete at the end is shown as it is."""
        is_text = finish_reason is not FinishReason.STOP or self._submission.params.include_stop_str_in_output
        text = self._detokenizer.append([token_id]) if is_text else ""
        return text if finish_reason is None else text + self._detokenizer.flush()


@dataclass(slots=True)
class _Running:
    """A claimed request."""

    submission: Submission
    epoch: int
    next_index: int
    choices: list[_Choice]
    cached_tokens: int = 0
    events: list[Event] = field(default_factory=list)  # not yet handed out

    @property
    def finished(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)

    @property
    def waits_for_prompt(self) -> bool:
        """Whether events are kept back, for the one with the prompt's log probabilities to be the log's first."""
        return self.submission.params.prompt_logprobs is not None and self.choices[0].untouched

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.submission.prompt_token_ids),
            completion_tokens=sum(len(choice.token_ids) for choice in self.choices),
            cached_tokens=self.cached_tokens,
        )

    def extend(self, output: StepOutput, choice_index: int) -> Event:
        self.cached_tokens = max(self.cached_tokens, output.num_cached_tokens)
        event = self.choices[choice_index].extend(output)
        self.events.insert(0 if event.prompt_logprobs else len(self.events), event)
        return event


class OutputProcessor:
    """Holds every claimed request of this worker."""

    def __init__(self, tokenizer: TokenBytes) -> None:
        self._tokenizer = tokenizer
        self._running: dict[str, _Running] = {}

    @property
    def num_choices(self) -> int:
        """Sequences that are still being generated."""
        return sum(c.finish_reason is None for running in self._running.values() for c in running.choices)

    def begin(self, claim: Claim) -> list[Request]:
        """The engine requests of a claim: one per choice that the log does not show as ended."""
        submission = claim.submission
        choices = [_Choice(index, submission, self._tokenizer) for index in range(submission.params.n)]
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
            event = self._running[request_id].extend(output, choice_index)
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
            if running.events and not running.waits_for_prompt:
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
    params = submission.params
    params = replace(
        params,
        n=1,
        seed=choice_seed(params.seed, choice.index),
        prompt_logprobs=params.prompt_logprobs if choice.index == 0 else None,  # the prompt is the same for all
    )
    return Request(
        engine_id(submission.request_id, choice.index),
        submission.prompt_token_ids,
        params,
        output_token_ids=choice.token_ids,
        cache_salt=prefix_cache_salt(submission),
        priority=submission.priority,
        mirostat_mu=choice.mirostat_mu,
    )


def prefix_cache_salt(submission: Submission) -> str:
    """Tenants never share cached blocks, whatever they choose as salt: the tenant's length says where it ends."""
    return f"{len(submission.tenant)}:{submission.tenant}{submission.cache_salt}"


def choice_seed(seed: int, choice: int) -> int:
    """Choice 0 keeps the request's seed; the others get independent ones, the same on every worker."""
    if choice == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{choice}".encode()).digest()
    return int.from_bytes(digest[:8], "big") & MAX_SEED
