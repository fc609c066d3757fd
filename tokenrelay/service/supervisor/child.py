"""One process of ours, from its start to its end.

It tells that it is ready by writing a newline to the pipe it is given as ``--ready-fd``, as s6's services do.
No child outlives this process: Linux kills them with it (PDEATHSIG), even on kill -9.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress

import structlog

from tokenrelay.service.embedded_valkey import die_with_parent

log = structlog.get_logger()


class Child:
    """A running process. ``label`` is what whoever started it calls it by."""

    def __init__(self, process: asyncio.subprocess.Process, ready: asyncio.Task[bool], label: str) -> None:
        self.label = label
        self._process = process
        self._ready = ready

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def was_ready(self) -> bool:
        return self._ready.done() and self._ready.result()

    async def ready(self) -> bool:
        """Once it is ready: True; if it ends before: False."""
        return await asyncio.shield(self._ready)

    async def wait(self) -> int:
        """Its exit code, when it has ended."""
        code = await self._process.wait()
        await asyncio.shield(self._ready)
        return code

    async def stop(self, seconds: float) -> int:
        """SIGTERM; SIGKILL if it has not ended in time. Returns the exit code."""
        with suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(seconds):
                return await self.wait()
        except TimeoutError:
            log.error("process did not drain", pid=self.pid)
            return await self.kill()

    async def kill(self) -> int:
        with suppress(ProcessLookupError):
            self._process.kill()
        return await self.wait()


async def start_child(
    command: Sequence[str], environment: Mapping[str, str], *, fds: Sequence[int] = (), label: str = ""
) -> Child:
    """Run a program that takes ``--ready-fd``; it inherits ``fds``. Raises OSError when nothing can be started."""
    read_end, write_end = os.pipe()
    try:
        process = await asyncio.create_subprocess_exec(
            *(*command, "--ready-fd", str(write_end)),
            env=environment,
            pass_fds=[*fds, write_end],
            preexec_fn=die_with_parent(signal.SIGKILL),
            start_new_session=True,  # a Ctrl-C reaches the supervisor only, which then drains in order
        )
    except BaseException:
        os.close(read_end)
        raise
    finally:
        os.close(write_end)
    return Child(process, asyncio.create_task(_says_something(read_end)), label)


async def _says_something(read_end: int) -> bool:
    """Whether anything is written to the pipe before its other end is closed, by the process or by its death."""
    reader = asyncio.StreamReader()
    pipe = os.fdopen(read_end, "rb", buffering=0)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    try:
        return bool(await reader.read(1))
    finally:
        transport.close()
