"""The choices of one HTTP request, over the one or several queued requests that make it up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple, Self

from tokenrelay.model.sampling_params import TokenLogprobs
from tokenrelay.service.api.generation import Generation, Generations
from tokenrelay.service.api.schemas.usage import CompletionUsage, PromptTokensDetails
from tokenrelay.service.messages import Event, Submission, Usage

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

    @property
    def num_entries(self) -> int:
        """Log probabilities to write."""
        return sum(1 + len(token.top) for token in (*self.prompt_logprobs, *self.logprobs) if token)

    @property
    def mean_logprob(self) -> float:
        return fmean(token.logprob for token in self.logprobs) if self.logprobs else 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """What one event of a log means to the client. ``usage`` comes with the last."""

    index: int | None  # of the event in its log, the client's Last-Event-ID; None if there are several logs
    output: Output
    usage: CompletionUsage | None = None


class Finished(NamedTuple):
    outputs: list[Output]
    usage: CompletionUsage


class Choices:
    """``n`` choices per prompt, numbered prompt by prompt. Close it, or its requests run on for nobody."""

    def __init__(self, generations: Generations, running: Sequence[Generation], n: int) -> None:
        self._generations = generations
        self._running = running
        self._n = n

    @classmethod
    async def start(cls, generations: Generations, submissions: Sequence[Submission]) -> Self:
        """Queue all of them, or none: if one is refused, those before it are cancelled."""
        running: list[Generation] = []
        choices = cls(generations, running, submissions[0].params.n)
        try:
            for submission in submissions:
                running.append(await generations.start(submission))
        except BaseException:
            await choices.close()
            raise
        return choices

    async def close(self) -> None:
        for generation in self._running:
            await self._generations.close(generation)

    async def steps(self) -> AsyncGenerator[Step, None]:
        """Raises GenerationFailed as soon as one of the requests fails."""
        usages: list[Usage] = []
        firsts = _FirstOutputs()
        async with aclosing(self._events()) as events:
            async for prompt, index, event in events:
                if event.usage:
                    usages.append(event.usage)
                yield Step(
                    index if len(self._running) == 1 else None,
                    _output(prompt * self._n + event.choice, event, firsts.prompt_logprobs(prompt, event)),
                    _total(usages) if len(usages) == len(self._running) else None,
                )

    async def finished(self, n: int) -> Finished:
        """All of it, once it is complete: the ``n`` best choices of each prompt."""
        parts: list[list[Output]] = [[] for _ in range(len(self._running) * self._n)]
        usage = _total([])
        async with aclosing(self.steps()) as steps:
            async for step in steps:
                parts[step.output.choice].append(step.output)
                usage = step.usage or usage
        return Finished(best_of([_joined(of_choice) for of_choice in parts], self._n, n), usage)

    def _events(self) -> AsyncGenerator[tuple[int, int, Event], None]:
        return _sole(self._running[0]) if len(self._running) == 1 else _interleaved(self._running)


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
    return Output(choice, event.text, event.token_ids, event.logprobs, prompt_logprobs, event.finish_reason)


def _joined(parts: Sequence[Output]) -> Output:
    """The whole output of one choice."""
    return Output(
        parts[0].choice,
        "".join(part.text for part in parts),
        [token_id for part in parts for token_id in part.token_ids],
        [token for part in parts for token in part.logprobs],
        parts[0].prompt_logprobs,
        next(part.finish_reason for part in reversed(parts) if part.finish_reason),
    )


async def _sole(generation: Generation) -> AsyncGenerator[tuple[int, int, Event], None]:
    """The usual case, without a task per event."""
    async for index, event in generation:
        yield 0, index, event


async def _interleaved(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, int, Event], None]:
    """(position of the generation, index, event), in the order of arrival."""
    pending = {asyncio.ensure_future(anext(generation)): i for i, generation in enumerate(generations)}
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


def _total(usages: Sequence[Usage]) -> CompletionUsage:
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
