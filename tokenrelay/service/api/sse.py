"""A stream of chunks as server-sent events.

Promises: an ``id:`` on every chunk, to resume behind it, a comment when silent, and a definite end: the chunks' own or
one error object, then ``[DONE]``. A client that goes away ends it at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import NoReturn, Protocol

import structlog
from fastapi.sse import format_sse_event
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tokenrelay.service.api.choices import LARGE_LOGPROBS, Choices, Step
from tokenrelay.service.api.connection import was_cut_off
from tokenrelay.service.api.event_loop import ClientGone, client_gone, off_loop_if_large, race
from tokenrelay.service.api.generation import GenerationFailed, Generations
from tokenrelay.service.api.schemas.errors import ErrorBody
from tokenrelay.service.errors import ServiceError

KEEP_ALIVE = b": keep-alive\n"  # no blank line: openai's client takes that for an event once it has seen an id
RETRY = b"retry: 1000\n"  # milliseconds until an EventSource connects again; no blank line, for the same reason
DONE = format_sse_event(data_str="[DONE]")

log = structlog.get_logger()


class ChunkFormat(Protocol):
    """How a route writes its chunks."""

    def opening(self, first: Step) -> Sequence[BaseModel]:
        """What comes before the first step's chunks."""

    def chunks(self, step: Step) -> Sequence[BaseModel]: ...

    def pass_over(self, step: Step) -> None:
        """Instead of ``chunks``: the client has them."""


class EventStream(Response):
    """Owns ``choices``: closes them however the response ends."""

    media_type = "text/event-stream"

    def __init__(
        self,
        choices: Choices,
        chunk_format: ChunkFormat,
        generations: Generations,
        keep_alive_seconds: float,
        headers: Mapping[str, str],
        done: bytes = DONE,
        interim: AsyncGenerator[bytes, None] | None = None,
    ) -> None:
        """``interim``: what to send before the first chunk, looked at as often as it yields; it need not end."""
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        self._choices = choices
        self._format = chunk_format
        self._generations = generations
        self._keep_alive_seconds = keep_alive_seconds
        self._done = done
        self._interim = interim
        self._opened = choices.cursor.has_begun  # once a step came, whose chunks the client has or gets
        self._last_sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await self._send(send, RETRY)
            error = await self._stream_until_failure(receive, send)
            ending = frame(ErrorBody.model_validate(error.body())) if error else b""
            await send({"type": "http.response.body", "body": ending + self._done, "more_body": False})
        except ClientGone:
            pass
        finally:
            await self._choices.close(may_return=was_cut_off(scope))

    async def _stream_until_failure(self, receive: Receive, send: Send) -> ServiceError | None:
        try:
            await race(
                self._stream(send),
                client_gone(receive),
                self._keep_alive(send),
                self._tell_interim(send),
                self._generations.interruption(),
            )
        except GenerationFailed as failure:
            return failure.error
        except ClientGone:
            raise
        except Exception:
            log.exception("stream failed")
            return ServiceError("The server failed; the error was logged.")
        return None

    async def _stream(self, send: Send) -> None:
        async with aclosing(self._choices.steps()) as steps:
            async for step in steps:
                if step.index <= self._choices.cursor.num_seen(step.prompt):
                    self._format.pass_over(step)
                else:
                    size = step.output.num_entries
                    frames = await off_loop_if_large(size, LARGE_LOGPROBS, partial(self._frames, step, self._opened))
                    self._opened = True
                    if frames:
                        await self._send(send, b"".join(frames))
                self._opened = True

    def _frames(self, step: Step, opened: bool) -> list[bytes]:
        """Every chunk has an id: a client that saw it has seen all before."""
        opening = [] if opened else self._format.opening(step)
        chunks = [*opening, *self._format.chunks(step)]
        return [frame(chunk, at) for at, chunk in self._choices.cursor.unseen(step.prompt, step.index, chunks)]

    async def _tell_interim(self, send: Send) -> NoReturn:
        if self._interim is not None:
            async with aclosing(self._interim) as frames:
                async for body in frames:
                    if self._opened:
                        break
                    if body:
                        await self._send(send, body)
        while True:
            await asyncio.Event().wait()

    async def _keep_alive(self, send: Send) -> NoReturn:
        clock = asyncio.get_running_loop().time
        self._last_sent = clock()
        while True:
            await asyncio.sleep(self._last_sent + self._keep_alive_seconds - clock())
            if clock() >= self._last_sent + self._keep_alive_seconds:
                await self._send(send, KEEP_ALIVE)

    async def _send(self, send: Send, body: bytes) -> None:
        self._last_sent = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": body, "more_body": True})


def frame(chunk: BaseModel, at: str | None = None) -> bytes:
    return format_sse_event(data_str=chunk.model_dump_json(exclude_unset=True), id=at)
