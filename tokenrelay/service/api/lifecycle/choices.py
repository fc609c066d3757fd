"""The choices of one HTTP request, over the one or several queued requests that make it up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple, Self

from msgspec.structs import replace as replace_fields

from tokenrelay.model.sampling_params import TokenLogprobs
from tokenrelay.service.allowance import Allowance
from tokenrelay.service.api.lifecycle.cursor import Cursor
from tokenrelay.service.api.lifecycle.generation import Generation, Generations
from tokenrelay.service.api.lifecycle.timings import timings_of
from tokenrelay.service.api.schemas.usage import CompletionUsage, PromptTokensDetails, Timings
from tokenrelay.service.errors import ServiceError
from tokenrelay.service.messages import Event, Submission, Usage
from tokenrelay.service.terms import AnswerSpec, Terms, part_ids

LARGE_LOGPROBS = 1000  # entries: some milliseconds of formatting


@dataclass(frozen=True, slots=True)
class Output:
    """What one choice emitted: in one event, or altogether. ``prompt_logprobs`` come with the first of each choice."""

    choice: int
    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    prompt_logprobs: Sequence[TokenLogprobs | None] = ()
    finish_reason: str | None = None
    stop_string: str = ""
    embedding: bytes = b""

    @property
    def num_entries(self) -> int:
        """Numbers to write: log probabilities, or an embedding's."""
        told = (*self.prompt_logprobs, *self.logprobs)
        return len(self.embedding) // 4 + sum(1 + len(token.top) for token in told if token)

    @property
    def mean_logprob(self) -> float:
        return fmean(token.logprob for token in self.logprobs) if self.logprobs else 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """What one event of a log means to the client. ``usage`` comes with the last."""

    index: int  # of the event in its log
    output: Output
    usage: CompletionUsage | None = None
    prompt: int = 0  # whose log it is
    timings: Timings | None = None  # with the last, if asked for


class Finished(NamedTuple):
    outputs: list[Output]
    usage: CompletionUsage
    timings: Timings | None = None


class Choices:
    """Some choices per prompt, numbered prompt by prompt. Close it, or its requests run on for nobody.

    ``cursor`` tells what the client has seen: events that it has not may come last, whatever the order they came in.
    """

    def __init__(self, generations: Generations) -> None:
        self.cursor = Cursor(0)
        self._generations = generations
        self._running: list[Generation] = []

    @classmethod
    async def start(cls, generations: Generations, submissions: Sequence[Submission], terms: Sequence[Terms]) -> Self:
        """Queue all of them, or none: if one is refused, those before it are cancelled.

        If the first one's idempotency key stands for an earlier request, the others are parts of that one, too.
        """
        choices = cls(generations)
        async with choices._closed_on_failure():
            for i, (submission, its_terms) in enumerate(zip(submissions, terms, strict=True)):
                if i > 0:
                    submission = replace_fields(submission, request_id=part_ids(choices.relay_id, len(terms))[i])
                choices._running.append(await generations.start(submission, its_terms))
        choices.cursor = Cursor(len(terms))
        return choices

    @classmethod
    async def resume(cls, generations: Generations, request_ids: Sequence[str], cursor: Cursor) -> Self:
        """Read requests of any process, all of them. Raises NotFoundError."""
        choices = cls(generations)
        async with choices._closed_on_failure():
            for prompt, request_id in enumerate(request_ids):
                choices._running.append(await generations.join(request_id, cursor.num_seen(prompt)))
        choices.cursor = cursor
        return choices

    @asynccontextmanager
    async def _closed_on_failure(self) -> AsyncIterator[None]:
        try:
            yield
        except BaseException:
            await self.close()
            raise

    @property
    def relay_id(self) -> str:
        """Of the HTTP request that began them: not this one's, if this one joined them."""
        return self._running[0].relay_id

    @property
    def request_ids(self) -> list[str]:
        """One per prompt."""
        return [generation.request_id for generation in self._running]

    @property
    def answers(self) -> list[AnswerSpec]:
        """How each prompt's output is answered."""
        return [generation.answer for generation in self._running]

    @property
    def joined(self) -> bool:
        return self._running[0].account is None

    @property
    def allowance(self) -> Allowance | None:
        """What is left of the tenant's limits, if this HTTP request was charged to them."""
        return self._running[-1].allowance

    @property
    def ready(self) -> bool:
        """Whether the next step is here."""
        return len(self._running) == 1 and self._running[0].ready

    async def close(self, *, may_return: bool = False) -> None:
        for generation in self._running:
            await self._generations.close(generation, may_return=may_return)

    async def steps(self) -> AsyncGenerator[Step, None]:
        """Raises GenerationFailed as soon as one of the requests fails."""
        usages: list[Usage] = []
        firsts = _FirstOutputs()
        async with aclosing(self._events()) as events:
            async for prompt, index, event in events:
                if event.usage:
                    usages.append(event.usage)
                usage = total_usage(usages) if len(usages) == len(self._running) else None
                output = _output(prompt * self._n + event.choice, event, firsts.prompt_logprobs(prompt, event))
                yield Step(index, output, usage, prompt, await self._timings(usage))

    async def _timings(self, usage: CompletionUsage | None) -> Timings | None:
        """At the end, if they were asked for and can be had."""
        if usage is None or not self.answers[0].include_timings:
            return None
        with suppress(ServiceError):
            return timings_of(await self._generations.timelines(self.request_ids), usage)
        return None

    async def finished(self, n: int) -> Finished:
        """All of it, once it is complete: the ``n`` best choices of each prompt."""
        parts: list[list[Output]] = [[] for _ in range(len(self._running) * self._n)]
        usage, timings = total_usage([]), None
        async with aclosing(self.steps()) as steps:
            async for step in steps:
                parts[step.output.choice].append(step.output)
                usage, timings = step.usage or usage, step.timings or timings
        return Finished(best_of([_joined(of_choice) for of_choice in parts], self._n, n), usage, timings)

    @property
    def _n(self) -> int:
        """Choices generated per prompt."""
        return self._running[0].answer.num_generated

    def _events(self) -> AsyncGenerator[tuple[int, int, Event], None]:
        if len(self._running) == 1:
            return _sole(self._running[0])
        num_seen = [self.cursor.num_seen(prompt) for prompt in range(len(self._running))]
        return _interleaved(self._running, num_seen)


def lone_step(index: int, event: Event) -> Step:
    """Of a request with one prompt, read from its log. The event is no error."""
    usage = total_usage([event.usage]) if event.usage else None
    return Step(index, _output(event.choice, event, event.prompt_logprobs), usage)


def best_of(outputs: Sequence[Output], num_generated: int, n: int) -> list[Output]:
    """Of each prompt's outputs the ``n`` likeliest per token, likeliest first and numbered anew. (OpenAI's rule)"""
    if num_generated == n:
        return list(outputs)
    prompts = [outputs[start : start + num_generated] for start in range(0, len(outputs), num_generated)]
    best = [output for prompt in prompts for output in sorted(prompt, key=_likeliest_first)[:n]]
    return [replace(output, choice=i) for i, output in enumerate(best)]


def _likeliest_first(output: Output) -> float:
    return -output.mean_logprob


class _FirstOutputs:
    """A log tells the prompt's log probabilities once, in its first event; a client reads them in each choice's."""

    def __init__(self) -> None:
        self._told: dict[int, Sequence[TokenLogprobs | None]] = {}
        self._begun: set[tuple[int, int]] = set()

    def prompt_logprobs(self, prompt: int, event: Event) -> Sequence[TokenLogprobs | None]:
        """Empty behind a choice's first event."""
        told = self._told.setdefault(prompt, event.prompt_logprobs)
        if (prompt, event.choice) in self._begun:
            return ()
        self._begun.add((prompt, event.choice))
        return told


def _output(choice: int, event: Event, prompt_logprobs: Sequence[TokenLogprobs | None]) -> Output:
    return Output(
        choice,
        event.text,
        event.token_ids,
        event.logprobs,
        prompt_logprobs,
        event.finish_reason,
        event.stop_string,
        event.embedding,
    )


def _joined(parts: Sequence[Output]) -> Output:
    """The whole output of one choice."""
    return Output(
        parts[0].choice,
        "".join(part.text for part in parts),
        [token_id for part in parts for token_id in part.token_ids],
        [token for part in parts for token in part.logprobs],
        parts[0].prompt_logprobs,
        next(part.finish_reason for part in reversed(parts) if part.finish_reason),
        "".join(part.stop_string for part in parts),
        b"".join(part.embedding for part in parts),
    )


async def _sole(generation: Generation) -> AsyncGenerator[tuple[int, int, Event], None]:
    """The usual case, without a task per event."""
    async for index, event in generation:
        yield 0, index, event


async def _interleaved(
    generations: Sequence[Generation], num_seen: Sequence[int]
) -> AsyncGenerator[tuple[int, int, Event], None]:
    """(position of the generation, index, event): what the client has seen, then the rest in the order of arrival."""
    for position, generation in enumerate(generations):
        index = 0
        while index < num_seen[position] and not generation.ended:
            index, event = await anext(generation)
            yield position, index, event
    pending = {asyncio.ensure_future(anext(g)): i for i, g in enumerate(generations) if not g.ended}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                position = pending.pop(task)
                index, event = task.result()
                if not event.terminal:
                    pending[asyncio.ensure_future(anext(generations[position]))] = position
                yield position, index, event
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


def total_usage(usages: Sequence[Usage]) -> CompletionUsage:
    """Of several prompts together."""
    prompt = sum(usage.prompt_tokens for usage in usages)
    completion = sum(usage.completion_tokens for usage in usages)
    forgotten = max((usage.forgotten_tokens for usage in usages), default=0)
    return CompletionUsage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(usage.cached_tokens for usage in usages)),
        **({"forgotten_tokens": forgotten} if forgotten else {}),
    )
