"""From sampled ids to log events: text, stop strings, finish reasons, usage.

Pure computation in the engine's thread, so that a stop string ends generation before another token is computed.
All of its state can be rebuilt from the events already in the log: that is how a request is resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import msgspec

from tokenrelay.model.detokenizer import TokenBytes
from tokenrelay.model.engine.beam_search import BeamSearch, Hypothesis
from tokenrelay.model.engine.request import Request
from tokenrelay.model.engine.step import StepOutput
from tokenrelay.model.sampling_params import MAX_SEED, FinishReason, SamplingParams
from tokenrelay.model.structured.compiler import CompiledGrammar
from tokenrelay.model.structured.constraint import Constraint
from tokenrelay.service.messages import Error, Event, Submission, Usage
from tokenrelay.service.queue import Claim
from tokenrelay.service.token_log import Publication
from tokenrelay.service.worker.choice import Choice


class EngineWork(NamedTuple):
    """What the engine must do before its next step: forget these requests, take those."""

    abort: list[str]
    add: list[Request]


@dataclass(slots=True)
class _Running:
    """A claimed request. A ``search`` makes its choices all at once, at the end."""

    submission: Submission
    epoch: int
    next_index: int
    choices: list[Choice]
    context: int = 0  # tokens that attention sees, if sequences may outgrow it
    search: BeamSearch | None = None
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
        num_prompt_tokens = len(self.submission.prompt_token_ids)
        num_tokens = num_prompt_tokens + max(len(choice.token_ids) for choice in self.choices)
        return Usage(
            prompt_tokens=num_prompt_tokens,
            completion_tokens=sum(len(choice.token_ids) for choice in self.choices),
            cached_tokens=self.cached_tokens,
            forgotten_tokens=max(0, num_tokens - self.context) if self.context else 0,
        )

    @property
    def engine_ids(self) -> list[str]:
        """Of what the engine computes for it."""
        if self.search is not None:
            return self.search.request_ids
        return [engine_id(self.submission.request_id, c.index) for c in self.choices if c.finish_reason is None]

    def take_hypotheses(self) -> None:
        """The end of a search, the best choice first. There may be fewer than asked for: the rest is empty."""
        assert self.search is not None
        nothing = Hypothesis((), 0.0, FinishReason.STOP)
        found = [*(self.search.hypotheses or ()), *[nothing] * len(self.choices)]
        self.cached_tokens = self.search.num_cached_tokens
        for choice, hypothesis in zip(self.choices, found, strict=False):
            self.events.append(choice.extend(StepOutput("", hypothesis.token_ids, hypothesis.finish_reason)))

    def extend(self, output: StepOutput, choice_index: int) -> Event:
        self.cached_tokens = max(self.cached_tokens, output.num_cached_tokens)
        event = self.choices[choice_index].extend(output)
        self.events.insert(0 if event.prompt_logprobs else len(self.events), event)
        return event


class OutputProcessor:
    """Holds every claimed request of this worker."""

    def __init__(self, tokenizer: TokenBytes, eos_token_ids: Collection[int] = (), context: int = 0) -> None:
        """``context``: tokens that attention sees, if sequences may outgrow it."""
        self._tokenizer = tokenizer
        self._context = context
        self._eos_token_ids = eos_token_ids
        self._running: dict[str, _Running] = {}

    @property
    def num_choices(self) -> int:
        """Sequences that are still being generated."""
        return sum(c.finish_reason is None for running in self._running.values() for c in running.choices)

    def begin(self, claim: Claim, grammar: CompiledGrammar | None = None) -> list[Request]:
        """The engine requests of a claim: one per choice that the log does not show as ended."""
        submission = claim.submission
        choices = [Choice(index, submission, self._tokenizer) for index in range(submission.params.n)]
        for event in claim.log:
            choices[event.choice].replay(event)
        running = _Running(submission, claim.epoch, len(claim.log) + 1, choices, self._context)
        self._running[submission.request_id] = running
        if submission.params.beam_width and not running.finished:
            running.search = BeamSearch(
                _engine_request(submission, submission.request_id, submission.params), self._eos_token_ids
            )
            return running.search.start()
        return [_choice_request(submission, choice, grammar) for choice in choices if choice.finish_reason is None]

    def process(self, outputs: Iterable[StepOutput]) -> EngineWork:
        """Turn a step's tokens into events. To be aborted is whose text hit a stop string; to be added, a next beam."""
        work = EngineWork([], [])
        for output in outputs:
            request_id, choice_index = split_engine_id(output.request_id)
            running = self._running[request_id]
            if running.search is not None:
                work.add.extend(running.search.process(output))
                if running.search.hypotheses is not None:
                    running.take_hypotheses()
                continue
            event = running.extend(output, choice_index)
            if event.finish_reason is not None and output.finish_reason is None:
                work.abort.append(output.request_id)
        return work

    def cancel(self, request_id: str) -> list[str]:
        """End a request early. Returns the engine ids to abort."""
        running = self._running.get(request_id)
        if running is None:
            return []
        engine_ids = running.engine_ids
        for choice in running.choices:
            if choice.finish_reason is None:
                choice.finish_reason = FinishReason.CANCELLED
                running.events.append(Event(choice=choice.index, finish_reason=FinishReason.CANCELLED))
        return engine_ids

    def fail(self, request_id: str, error: Error) -> list[str]:
        """End a request with an error. Returns the engine ids to abort."""
        engine_ids = self.cancel(request_id)
        if request_id in self._running:
            self._running[request_id].events = [Event(error=error)]
        return engine_ids

    def drop(self, request_id: str) -> list[str]:
        """Forget a request that another worker owns now. Returns the engine ids to abort."""
        running = self._running.pop(request_id, None)
        return running.engine_ids if running else []

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


def _choice_request(submission: Submission, choice: Choice, grammar: CompiledGrammar | None) -> Request:
    params = submission.params
    params = replace(
        params,
        n=1,
        seed=choice_seed(params.seed, choice.index),
        prompt_logprobs=params.prompt_logprobs if choice.index == 0 else None,  # the prompt is the same for all
    )
    constraint = None if grammar is None else grammar.constraint()
    return _engine_request(submission, engine_id(submission.request_id, choice.index), params, choice, constraint)


def _engine_request(
    submission: Submission,
    request_id: str,
    params: SamplingParams,
    so_far: Choice | None = None,
    constraint: Constraint | None = None,
) -> Request:
    return Request(
        request_id,
        submission.prompt_token_ids,
        params,
        output_token_ids=so_far.token_ids if so_far else (),
        cache_salt=prefix_cache_salt(submission),
        priority=submission.priority,
        constraint=constraint,
        mirostat_mu=so_far.mirostat_mu if so_far else None,
        pooling=submission.pooling,
        adapter=submission.adapter.digest if submission.adapter else "",
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
