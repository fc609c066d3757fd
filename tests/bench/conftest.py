"""Servers to measure: the real API over a paced worker, and one that says what a test wrote down."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from tests.service.api.conftest import api_settings, loaded_model, running_server, served_model
from tests.service.conftest import valkey

Say = Callable[..., Awaitable[str]]

__all__ = ["api_settings", "loaded_model", "running_server", "served_model", "valkey"]


@asynccontextmanager
async def saying(*parts: bytes) -> AsyncIterator[str]:
    """The URL of a server that answers every request with these bytes, one packet each, and hangs up."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.fixture
async def say() -> AsyncIterator[Say]:
    """``url = await say(b"HTTP/1.1 …", …)``, until the test ends."""
    async with AsyncExitStack() as stack:

        async def start(*parts: bytes) -> str:
            return await stack.enter_async_context(saying(*parts))

        yield start
