"""The choices of one HTTP request, over the one or several queued requests that make it up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import NamedTuple, Self

from tokenrelay.service.api.generation import Generation, Generations
from tokenrelay.service.api.schemas.usage import CompletionUsage, PromptTokensDetails
from tokenrelay.service.messages import Event, Submission, Usage


@dataclass(frozen=True, slots=True)
class Step:
    """What one event of a log means to the client. ``usage`` comes with the last."""

    index: int | None  # of the event in its log, the client's Last-Event-ID; None if there are several logs
    choice: int
    text: str
    finish_reason: str | None
    usage: CompletionUsage | None


@dataclass(frozen=True, slots=True)
class FinishedChoice:
    index: int
    text: str
    finish_reason: str


class Finished(NamedTuple):
    choices: list[FinishedChoice]
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
        async with aclosing(self._events()) as events:
            async for prompt, index, event in events:
                if event.usage:
                    usages.append(event.usage)
                yield Step(
                    index if len(self._running) == 1 else None,
                    prompt * self._n + event.choice,
                    event.text,
                    event.finish_reason,
                    _total(usages) if len(usages) == len(self._running) else None,
                )

    async def finished(self) -> Finished:
        """All of it, once it is complete."""
        texts: list[list[str]] = [[] for _ in range(len(self._running) * self._n)]
        reasons = [""] * len(texts)
        usage = _total([])
        async with aclosing(self.steps()) as steps:
            async for step in steps:
                texts[step.choice].append(step.text)
                reasons[step.choice] = step.finish_reason or reasons[step.choice]
                usage = step.usage or usage
        choices = [FinishedChoice(i, "".join(text), reasons[i]) for i, text in enumerate(texts)]
        return Finished(choices, usage)

    def _events(self) -> AsyncGenerator[tuple[int, int, Event], None]:
        return _sole(self._running[0]) if len(self._running) == 1 else _interleaved(self._running)


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
    return CompletionUsage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(usage.cached_tokens for usage in usages)),
    )
