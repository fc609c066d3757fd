"""A stream of chunks, in whatever bytes the route's format makes of them.

Promises: each chunk has a place to resume behind, a sign of life comes when it is silent, and there is a definite end:
the chunks' own or one error, then what the format calls done. A client that goes away ends it at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, NoReturn, Protocol

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tokenrelay.service.api.event_loop import ClientGone, client_gone, off_loop_if_large, race
from tokenrelay.service.api.http.connection import was_cut_off
from tokenrelay.service.api.lifecycle.choices import LARGE_LOGPROBS, Choices, Step
from tokenrelay.service.api.lifecycle.generation import GenerationFailed, Generations
from tokenrelay.service.errors import ServiceError

MAX_UNSENT = 64  # frames

log = structlog.get_logger()


class StreamFormat(Protocol):
    """How a route writes its stream: which chunks there are, and their bytes."""

    media_type: str
    preamble: bytes  # before anything else
    keep_alive: bytes  # while nothing else comes; empty where the protocol has no word for it
    done: bytes  # behind everything, also behind an error …
    resumed_done: bytes  # … and behind a stream that was asked for by its request's id

    def opening(self, first: Step) -> Sequence[Any]:
        """What comes before the first step's chunks."""

    def chunks(self, step: Step) -> Sequence[Any]: ...

    def pass_over(self, step: Step) -> None:
        """Instead of ``chunks``: the client has them."""

    def frame(self, chunk: Any, at: str) -> bytes:
        """One of the chunks on the wire. ``at`` is the id to resume behind it."""

    def failure(self, error: ServiceError) -> bytes:
        """What ends the stream instead of the chunks that do not come."""


class EventStream(Response):
    """Owns ``choices``: closes them however the response ends."""

    def __init__(
        self,
        choices: Choices,
        stream_format: StreamFormat,
        generations: Generations,
        keep_alive_seconds: float,
        headers: Mapping[str, str],
        *,
        resumed: bool = False,
        interim: AsyncGenerator[bytes, None] | None = None,
    ) -> None:
        """``interim``: what to send before the first chunk, looked at as often as it yields; it need not end."""
        self.status_code = 200
        self.background = None
        self.media_type = stream_format.media_type
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        self._choices = choices
        self._format = stream_format
        self._generations = generations
        self._keep_alive_seconds = keep_alive_seconds
        self._done = stream_format.resumed_done if resumed else stream_format.done
        self._interim = interim
        self._opened = choices.cursor.has_begun  # once a step came, whose chunks the client has or gets
        self._unsent: list[bytes] = []  # frames with more behind them: together they are sent in half the time
        self._last_sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await self._send(send, self._format.preamble)
            error = await self._stream_until_failure(receive, send)
            ending = self._format.failure(error) if error else b""
            await self._send(send, b"".join(self._unsent) + ending + self._done, more=False)
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
                    self._unsent += frames
                    if not self._choices.ready or len(self._unsent) >= MAX_UNSENT:
                        await self._flush(send)
                self._opened = True

    async def _flush(self, send: Send) -> None:
        frames, self._unsent = self._unsent, []
        if frames:
            await self._send(send, b"".join(frames))

    def _frames(self, step: Step, opened: bool) -> list[bytes]:
        """Every chunk has an id: a client that saw it has seen all before."""
        opening = [] if opened else self._format.opening(step)
        chunks = [*opening, *self._format.chunks(step)]
        return [
            self._format.frame(chunk, at) for at, chunk in self._choices.cursor.unseen(step.prompt, step.index, chunks)
        ]

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
                await self._send(send, self._format.keep_alive)

    async def _send(self, send: Send, body: bytes, *, more: bool = True) -> None:
        self._last_sent = asyncio.get_running_loop().time()
        if body or not more:
            await send({"type": "http.response.body", "body": body, "more_body": more})
