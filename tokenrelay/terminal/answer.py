"""One streamed answer, over as many connections as it takes: where one breaks, the next reads on behind the last event.

Whoever leaves an answer before its end cancels it on the server.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import HTTPException, HTTPResponse
from types import TracebackType
from typing import Any, NamedTuple, Self

from tokenrelay.terminal.errors import TerminalError, Unreachable
from tokenrelay.terminal.server import PATIENCE_SECONDS, SILENCE_SECONDS, Model, Server

RETURN_SECONDS = 60.0  # so long the server may be gone
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0
FAREWELL_SECONDS = 5.0


class Piece(NamedTuple):
    text: str
    reasoning: bool = False


class Answer:
    """Iterate over its pieces, inside ``with``. ``notice`` is told when a connection broke.

    Raises TerminalError when the server refuses or fails, or does not come back.
    """

    def __init__(
        self, server: Server, model: Model, path: str, body: dict[str, Any], notice: Callable[[str], None]
    ) -> None:
        self._server, self._resumes, self._path, self._notice = server, model.resumes, path, notice
        # a connection that breaks is no wish to cancel: that is said in so many words
        own = {"on_disconnect": "continue"} if model.resumes else {}
        self._body = {"model": model.name, "stream": True, **own, **body}
        self._name = ""  # of the request at the server
        self._key = {"Idempotency-Key": uuid.uuid4().hex} if model.resumes else {}
        self._last_id = "0"
        self._ended = True  # nothing is asked yet
        self._response: HTTPResponse | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._response is not None:
            self._response.close()
        if not self._ended and self._resumes:
            with suppress(TerminalError):
                self._cancel()

    def __iter__(self) -> Iterator[Piece]:
        self._ended = False
        try:
            self._response = self._ask()
        except TerminalError:
            self._ended = True
            raise
        yield from self._read(self._response)
        while not self._ended:
            self._response = self._come_back()
            yield from self._read(self._response)

    def _ask(self) -> HTTPResponse:
        """Asked twice, it is still one request: the key says so."""
        silence = SILENCE_SECONDS if self._resumes else PATIENCE_SECONDS
        response = self._server.open("POST", self._path, self._body, headers=self._key, timeout=silence)
        self._name = response.headers.get("X-Response-Id", "") if self._resumes else ""
        return response

    def _cancel(self) -> None:
        """Also a request whose name was not told yet when its client had enough."""
        if not self._name:
            self._ask().close()
        self._server.open("POST", f"/v1/requests/{self._name}/cancel", timeout=FAREWELL_SECONDS).close()

    def _read(self, response: HTTPResponse) -> Iterator[Piece]:
        """Until the stream's end, or that of the connection."""
        event: dict[str, str] = {}
        with suppress(OSError, HTTPException):
            for line in response:
                name, _, value = line.decode().rstrip("\r\n").partition(":")
                if name:
                    event[name] = value.removeprefix(" ")
                elif "data" in event:
                    yield from self._pieces(event["data"])
                    self._last_id = event.get("id", self._last_id)
                    event = {}
                if self._ended:
                    return

    def _pieces(self, data: str) -> Iterator[Piece]:
        if data == "[DONE]":
            self._ended = True
            return
        chunk = json.loads(data)
        if error := chunk.get("error"):
            self._ended = True
            raise TerminalError(error.get("message", "the server failed") if isinstance(error, dict) else str(error))
        for choice in chunk.get("choices", ()):
            told = choice.get("delta", choice)
            if reasoning := told.get("reasoning_content"):
                yield Piece(reasoning, reasoning=True)
            if text := told.get("content") or told.get("text"):
                yield Piece(text)

    def _come_back(self) -> HTTPResponse:
        if not self._name:
            raise TerminalError("the connection broke, and this server's streams cannot be read on")
        self._notice("the connection broke; reading on")
        pause, patience = FIRST_PAUSE, time.monotonic() + RETURN_SECONDS
        while True:
            time.sleep(pause)
            try:
                headers = {"Last-Event-ID": self._last_id}
                return self._server.open(
                    "GET", f"/v1/requests/{self._name}/stream", headers=headers, timeout=SILENCE_SECONDS
                )
            except Unreachable:
                if time.monotonic() > patience:
                    raise
            pause = min(2 * pause, LONGEST_PAUSE)
