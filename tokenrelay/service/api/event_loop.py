"""Keeping the event loop free, and giving up work whose reason is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar

from starlette.types import Receive

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection: nobody reads the answer."""


async def off_loop_if_large(size: int, large: int, work: Callable[[], T]) -> T:
    """Do ``work`` in a thread when it is large; a small piece would wait longer for a thread than it takes."""
    return await asyncio.to_thread(work) if size >= large else work()


async def client_gone(receive: Receive) -> NoReturn:
    """Raises ClientGone when the connection closes. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientGone


async def race(work: Coroutine[Any, Any, T], *watchers: Coroutine[Any, Any, NoReturn]) -> T:
    """The result of ``work``; or what the first watcher raises, after ``work`` was cancelled."""
    runner = asyncio.ensure_future(work)
    watching = [asyncio.ensure_future(watcher) for watcher in watchers]
    try:
        await asyncio.wait([runner, *watching], return_when=asyncio.FIRST_COMPLETED)
        for watcher in watching:
            if watcher.done() and not runner.done():
                watcher.result()
        return await runner
    finally:
        for task in (runner, *watching):
            task.cancel()
        await asyncio.gather(runner, *watching, return_exceptions=True)
