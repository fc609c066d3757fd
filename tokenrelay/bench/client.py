"""A client of an OpenAI-compatible server: one streamed completion, measured."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec

from tokenrelay.bench.exchange import Origin, RefusalError, exchange, said
from tokenrelay.bench.measured import Measured, TargetError

NO_ROOM = (429, 503)


class Choice(msgspec.Struct):
    """What a chunk says of one choice."""

    text: str | None = ""
    finish_reason: str | None = None


class Usage(msgspec.Struct):
    """The server's own count."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class Chunk(msgspec.Struct):
    """One event of a stream."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


class _Models(msgspec.Struct):
    data: list[_Model] = []


class _Model(msgspec.Struct):
    id: str


_chunks = msgspec.json.Decoder(Chunk)


class Client:
    """Every request has a connection of its own."""

    def __init__(self, url: str, *, api_key: str = "", timeout: float = 600.0) -> None:
        self.url, self._origin, self._timeout = url, Origin.of(url), timeout
        authorization = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._headers = {"content-type": "application/json", "user-agent": "tokenrelay-bench"} | authorization

    async def first_model(self) -> str:
        """That the server lists."""
        answer = bytearray()
        try:
            await self._exchange("GET", "/v1/models", b"", answer.extend)
            listed = msgspec.json.decode(bytes(answer), type=_Models).data
        except (OSError, RefusalError, msgspec.MsgspecError) as error:
            raise TargetError(f"{self.url}/v1/models: {str(error) or 'no answer'}") from error
        if not listed:
            raise TargetError(f"{self.url} lists no model: name one with --model")
        return listed[0].id

    async def complete(self, body: bytes, measured: Measured) -> Measured:
        """Fills ``measured`` as chunks come; a failure is noted in it, not raised."""
        try:
            await self._exchange("POST", "/v1/completions", body, Stream(measured).feed)
            measured.error = measured.error or ("" if measured.arrivals else "the stream had no output")
        except RefusalError as refusal:
            measured.error, measured.refused = str(refusal), refusal.status in NO_ROOM
        except OSError as error:
            measured.error = str(error) or f"no end of the answer within {self._timeout:g} s"
        measured.ended = time.perf_counter()
        return measured

    async def _exchange(self, method: str, path: str, body: bytes, receive: Any) -> None:
        async with asyncio.timeout(self._timeout):
            await exchange(self._origin, method, path, self._headers, body, receive)


class Stream:
    """Server-sent events, noted as they come."""

    def __init__(self, measured: Measured) -> None:
        self._measured, self._rest = measured, b""

    def feed(self, data: bytes) -> None:
        now = time.perf_counter()
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith((b"data: {", b"data:{")):
                self._note(_chunks.decode(line[5:]), now)

    def _note(self, chunk: Chunk, now: float) -> None:
        measured = self._measured
        if chunk.error:
            measured.error = f"the stream ended with an error: {said(msgspec.json.encode(chunk.error))}"
        if any(choice.text or not choice.finish_reason for choice in chunk.choices):  # else it only says the end
            measured.arrivals.append(now)
            measured.output_tokens += 1  # until the server says how many
        if chunk.usage:
            measured.prompt_tokens = chunk.usage.prompt_tokens
            measured.output_tokens = chunk.usage.completion_tokens
