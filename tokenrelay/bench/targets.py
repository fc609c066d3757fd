"""What is measured: a server behind a URL, or a process that does the whole workload by itself."""

from __future__ import annotations

import asyncio
import random
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from tokenrelay.bench.beside import beside, checked
from tokenrelay.bench.client import Client
from tokenrelay.bench.figures import Bounds, Figures, figures
from tokenrelay.bench.loops import closed_loop, open_loop
from tokenrelay.bench.measured import Measured, Run, TargetError
from tokenrelay.bench.workload import Workload

Advance = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Access:
    """How servers are spoken to."""

    model: str = ""
    api_key: str = ""
    timeout: float = 600.0


class Target(Protocol):
    """Something to measure."""

    name: str

    async def prepare(self) -> None:
        """Fails if it is not there."""

    async def measure(self, workload: Workload, bounds: Bounds, advance: Advance) -> tuple[Figures, str]:
        """The figures, and the first error. Calls ``advance`` for each request that ended."""


class Server:
    """Behind a URL."""

    def __init__(self, name: str, url: str, access: Access) -> None:
        self.name, self._access = name, access
        self._client = Client(url, api_key=access.api_key, timeout=access.timeout)
        self._model = ""

    async def prepare(self) -> None:
        self._model = self._access.model or await self._client.first_model()

    async def measure(self, workload: Workload, bounds: Bounds, advance: Advance) -> tuple[Figures, str]:
        if workload.beside:
            return await beside(self._client, self._model, workload), ""
        return _figures(await self._run(workload, advance), workload, bounds)

    async def _run(self, workload: Workload, advance: Advance) -> Run:
        rng, num_warm_up = random.Random(), workload.num_warm_up
        prompts = workload.prompts(rng, num_warm_up + workload.num_requests)
        bodies = [workload.body(self._model, prompt) for prompt in prompts]

        async def send(body: bytes, measured: Measured) -> Measured:
            await self._client.complete(body, measured)
            advance()
            return measured

        warm_up = await closed_loop(self._client.complete, bodies[:num_warm_up], workload.clients)
        for measured in warm_up.requests:
            checked(measured)
        if workload.rate:
            return await open_loop(send, bodies[num_warm_up:], workload.rate, rng)
        return await closed_loop(send, bodies[num_warm_up:], workload.clients)


class Process:
    """A command, started for every run: reads the workload from stdin as JSON, prints a ``Run`` as its last line.

    The workload is ``{"clients", "prompts": [[ids] or text, …], "max_tokens", "warm_up": [prompts]}``.
    """

    def __init__(self, name: str, command: str) -> None:
        self.name, self._command = name, shlex.split(command)

    async def prepare(self) -> None:
        if not self._command or not shutil.which(self._command[0]):
            raise TargetError(f"{self.name}: no such command: {self._command[0] if self._command else 'none'}")

    async def measure(self, workload: Workload, bounds: Bounds, advance: Advance) -> tuple[Figures, str]:
        if workload.rate or workload.beside:
            raise TargetError("a process is measured with --clients only, not with --rate or --beside")
        run = await self._run(workload)
        for _ in run.requests:
            advance()
        return _figures(run, workload, bounds)

    async def _run(self, workload: Workload) -> Run:
        process = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        try:
            printed, _ = await process.communicate(_as_json(workload))
        finally:
            if process.returncode is None:
                process.kill()
        if process.returncode:
            raise TargetError(f"{self._command[0]} ended with exit code {process.returncode}")
        try:
            return msgspec.json.decode(printed.strip().rpartition(b"\n")[2], type=Run)
        except msgspec.MsgspecError as error:
            raise TargetError(f"the last line of {self._command[0]} is no run: {error}") from error


def target(spec: str, access: Access) -> Target:
    """``[NAME=]URL`` or ``NAME=exec:COMMAND``. Without a name, the URL or the command is it."""
    named = re.match(r"([\w.+ -]+)=(?=https?:|exec:)", spec)
    what = spec[named.end() :] if named else spec
    name = named[1] if named else what.removeprefix("http://").rstrip("/").removesuffix("/v1")
    return Process(name, what.removeprefix("exec:")) if what.startswith("exec:") else Server(name, what, access)


def distinct(specs: Sequence[str], access: Access) -> list[Target]:
    """All of them, under names that tell them apart."""
    targets = [target(spec, access) for spec in specs]
    if len({target.name for target in targets}) < len(targets):
        raise TargetError("two targets have one name: give each a name of its own, NAME=URL")
    return targets


def _as_json(workload: Workload) -> bytes:
    rng = random.Random()
    return msgspec.json.encode(
        {
            "clients": workload.clients,
            "prompts": workload.prompts(rng, workload.num_requests),
            "max_tokens": workload.output_tokens,
            "warm_up": workload.prompts(rng, workload.num_warm_up),
        }
    )


def _figures(run: Run, workload: Workload, bounds: Bounds) -> tuple[Figures, str]:
    errors = [request.error for request in run.requests if request.error]
    if errors and not any(request.refused or not request.error for request in run.requests):
        raise TargetError(errors[0])
    alone = workload.clients == 1 and not workload.rate
    return figures(run, bounds, alone=alone), errors[0] if errors else ""
