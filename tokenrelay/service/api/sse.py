"""A stream of chunks as server-sent events.

Promises: the log's index as ``id:`` on the last chunk of each event, a comment when silent, and a definite end: the
chunks' own or one error object, then ``[DONE]``. A client that goes away ends it at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import NoReturn, Protocol

import structlog
from fastapi.sse import format_sse_event
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tokenrelay.service.api.choices import LARGE_LOGPROBS, Choices, Step
from tokenrelay.service.api.event_loop import ClientGone, client_gone, off_loop_if_large, race
from tokenrelay.service.api.generation import GenerationFailed, Generations
from tokenrelay.service.api.schemas.errors import ErrorBody
from tokenrelay.service.errors import ServiceError

KEEP_ALIVE = b": keep-alive\n"  # no blank line: openai's client takes that for an event once it has seen an id
DONE = format_sse_event(data_str="[DONE]")
STALL_SECONDS = 60.0  # a client that reads nothing for this long is gone; it may resume

log = structlog.get_logger()


class ChunkFormat(Protocol):
    """How a route writes its chunks."""

    def opening(self, first: Step) -> Sequence[BaseModel]:
        """What comes before the first step's chunks."""

    def chunks(self, step: Step) -> Sequence[BaseModel]: ...


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
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        self._choices = choices
        self._format = chunk_format
        self._generations = generations
        self._keep_alive_seconds = keep_alive_seconds
        self._last_sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            error = await self._stream_until_failure(receive, send)
            ending = frame(ErrorBody.model_validate(error.body())) + DONE if error else DONE
            await send({"type": "http.response.body", "body": ending, "more_body": False})
        except ClientGone:
            pass
        finally:
            await self._choices.close()

    async def _stream_until_failure(self, receive: Receive, send: Send) -> ServiceError | None:
        try:
            await race(
                self._stream(send), client_gone(receive), self._keep_alive(send), self._generations.interruption()
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
        opened = False
        async with aclosing(self._choices.steps()) as steps:
            async for step in steps:
                size = step.output.num_entries
                frames = await off_loop_if_large(size, LARGE_LOGPROBS, partial(self._frames, step, opened))
                opened = True
                if frames:
                    await self._send(send, b"".join(frames))

    def _frames(self, step: Step, opened: bool) -> list[bytes]:
        opening = [] if opened else [frame(chunk) for chunk in self._format.opening(step)]
        return opening + frames_of(self._format.chunks(step), step.index)

    async def _keep_alive(self, send: Send) -> NoReturn:
        clock = asyncio.get_running_loop().time
        self._last_sent = clock()
        while True:
            await asyncio.sleep(self._last_sent + self._keep_alive_seconds - clock())
            if clock() >= self._last_sent + self._keep_alive_seconds:
                await self._send(send, KEEP_ALIVE)

    async def _send(self, send: Send, body: bytes) -> None:
        self._last_sent = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(STALL_SECONDS):
                await send({"type": "http.response.body", "body": body, "more_body": True})
        except TimeoutError:
            raise ClientGone from None


def frames_of(chunks: Sequence[BaseModel], index: int | None) -> list[bytes]:
    """The id goes on the last: a client that saw it has seen the whole event."""
    return [frame(chunk, index if chunk is chunks[-1] else None) for chunk in chunks]


def frame(chunk: BaseModel, index: int | None = None) -> bytes:
    return format_sse_event(
        data_str=chunk.model_dump_json(exclude_unset=True), id=None if index is None else str(index)
    )
