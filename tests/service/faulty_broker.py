"""A broker as a network and an operator make it: it loses commands and replies, is slow, a replica, loading or full.

A proxy on a socket of its own, which understands as much of the protocol as is needed to fail one command at a time.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Self

COMMANDS_BYTES = 2**24
SUBSCRIPTIONS = (b"SUBSCRIBE", b"PSUBSCRIBE")


class Fault(StrEnum):
    """What becomes of one command."""

    SILENCE = "the command is lost; nothing comes, ever"
    CLOSED = "the connection closes before it"
    REPLY_LOST = "it is done, and the connection closes before the reply"
    READONLY = "READONLY You can't write against a read only replica."
    LOADING = "LOADING Valkey is loading the dataset in memory"
    OOM = "OOM command not allowed when used memory > 'maxmemory'."


REPLIES = (Fault.READONLY, Fault.LOADING, Fault.OOM)


class Dice:
    """Fails every command with the same probability, in one of all ways; a seed is a sequence of faults."""

    def __init__(self, seed: int, probability: float) -> None:
        self.thrown: Counter[Fault] = Counter()
        self._random = random.Random(seed)
        self._probability = probability

    def __call__(self) -> Fault | None:
        if self._random.random() >= self._probability:
            return None
        fault = self._random.choice(list(Fault))
        self.thrown[fault] += 1
        return fault


class FaultyBroker:
    """An async context manager; ``url`` is what clients connect to. ``fault`` is asked about every command."""

    def __init__(self, broker: Path, path: Path, fault: Callable[[], Fault | None], *, delay: float = 0.0) -> None:
        """``delay``: seconds for which each reply is held back."""
        self.url = f"unix://{path}"
        self.fault = fault
        self._broker = broker
        self._path = path
        self._delay = delay
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._accept, self._path, limit=COMMANDS_BYTES)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        broker_reader, broker_writer = await asyncio.open_unix_connection(self._broker, limit=COMMANDS_BYTES)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._relay(reader, writer, broker_reader, broker_writer)
        finally:
            for end in (writer, broker_writer):
                end.close()
                with suppress(ConnectionError):
                    await end.wait_closed()

    async def _relay(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        broker_reader: asyncio.StreamReader,
        broker_writer: asyncio.StreamWriter,
    ) -> None:
        whole = True  # a transaction fails as one
        while True:
            name, command = await _read_command(reader)
            fault = self.fault() if whole else None
            whole = name == b"EXEC" or (whole and name != b"MULTI")
            if fault is Fault.SILENCE:
                await reader.read()
            if fault in (Fault.SILENCE, Fault.CLOSED):
                return
            if fault in REPLIES:
                writer.write(f"-{fault}\r\n".encode())
                whole = True
                continue
            broker_writer.write(command)
            reply = await _read_value(broker_reader)
            if fault is Fault.REPLY_LOST:
                return
            if self._delay:
                await asyncio.sleep(self._delay)
            writer.write(reply)
            if name in SUBSCRIPTIONS:
                await _pass_on(broker_reader, writer, reader)
                return


async def _pass_on(
    broker_reader: asyncio.StreamReader, writer: asyncio.StreamWriter, reader: asyncio.StreamReader
) -> None:
    """Messages, until the subscriber leaves."""
    leaving = asyncio.create_task(reader.read())
    messages = asyncio.create_task(_copy(broker_reader, writer))
    try:
        await asyncio.wait({leaving, messages}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        messages.cancel()
        await asyncio.gather(leaving, messages, return_exceptions=True)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)


async def _read_command(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Its name, and all its bytes."""
    command = await _read_value(reader)
    _, _, name, *_ = command.split(b"\r\n", 3)
    return name.upper(), command


async def _read_value(reader: asyncio.StreamReader) -> bytes:
    """One value of RESP 2: a command is an array, a reply is anything."""
    head = await reader.readuntil(b"\r\n")
    kind, size = head[:1], head[1:-2]
    if kind == b"$" and int(size) >= 0:
        return head + await reader.readexactly(int(size) + 2)
    if kind == b"*":
        return head + b"".join([await _read_value(reader) for _ in range(int(size))])
    return head
