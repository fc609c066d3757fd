"""The API over a real socket, every answer judged, and a paced stand-in for the model worker."""

from __future__ import annotations

import asyncio
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
from prometheus_client import CollectorRegistry

from tests.service.published.judge import Judge
from tokenrelay.model.sampling_params import TokenLogprobs
from tokenrelay.service.api.app import create_app
from tokenrelay.service.api.http.connection import Connection
from tokenrelay.service.api.process import ApiProcess
from tokenrelay.service.api.served_model import ServedModel
from tokenrelay.service.api.server import DrainingServer
from tokenrelay.service.broker import connect
from tokenrelay.service.keys import Keys
from tokenrelay.service.messages import Error, Event, Submission, Usage, WorkerFacts
from tokenrelay.service.queue import Claim, Queue, cancellation
from tokenrelay.service.registry import Registry
from tokenrelay.service.settings import Settings
from tokenrelay.service.token_log import Publication, TokenLog

EMBEDDING_SIZE = 576  # of SmolLM2
JSON = {"content-type": "application/json"}

RUN_API = """
import socket
from tokenrelay.service.api.server import run_api
from tokenrelay.service.settings import Settings
run_api(Settings(), sock=socket.socket(fileno={fd}))
"""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where an API process answers, and which model it serves."""

    port: int
    settings: Settings
    model: str

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def keys(self) -> Keys:
        return Keys(self.model)


@dataclass(frozen=True, kw_only=True)
class Server(Endpoint):
    """One that runs in a thread here, and can be looked into."""

    process: ApiProcess
    uvicorn: DrainingServer
    judge: Judge

    @property
    def connections(self) -> list[Connection]:
        """Those open now."""
        return list(self.uvicorn.server_state.connections)  # type: ignore[arg-type]

    def num_tasks(self) -> int:
        """Of its event loop."""
        return asyncio.run_coroutine_threadsafe(_num_tasks(), self.uvicorn.servers[0].get_loop()).result(60)

    @property
    def metrics(self) -> CollectorRegistry:
        return self.process.metrics.registry


async def _num_tasks() -> int:
    return len(asyncio.all_tasks()) - 1


@contextmanager
def serving(settings: Settings, model: ServedModel) -> Iterator[Server]:
    """Serve from a thread with an event loop of its own, as a process would."""
    app = create_app(settings, model)
    server = DrainingServer(app, settings)
    judge = Judge(app)
    server.config.app = judge
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_for(lambda: server.started)
            yield Server(
                port=port, settings=settings, model=model.name, process=app.state.api, uvicorn=server, judge=judge
            )
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()
        assert judge.complaints() == []


@asynccontextmanager
async def api_process(settings: Settings, model: str) -> AsyncIterator[tuple[subprocess.Popen[bytes], Endpoint]]:
    """A real process, as the supervisor starts it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fd, port = listener.fileno(), listener.getsockname()[1]
        process = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-c", RUN_API.format(fd=fd)], env=settings.as_environment(), pass_fds=[fd]
        )
    endpoint = Endpoint(port=port, settings=settings, model=model)
    try:
        async with httpx.AsyncClient(base_url=endpoint.base_url, timeout=100) as http:
            assert (await http.get("/livez")).status_code == 200  # waits in the backlog until the process serves
        yield process, endpoint
    finally:
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.002)


def words(count: int) -> str:
    """What the paced worker writes for ``count`` tokens."""
    return "".join(word(i) for i in range(count))


def word(i: int) -> str:
    return f" w{i}"


def token_logprobs(token_id: int, logprob: float, num_top: int | None) -> TokenLogprobs:
    """What the paced worker says of a token: it is the third likeliest, after 100, 101 …"""
    return TokenLogprobs(token_id, logprob, 3, tuple((100 + i, -0.25 * (i + 1)) for i in range(num_top or 0)))


def embedding_of(token_ids: Sequence[int]) -> bytes:
    """What the paced worker makes of a pooled prompt: not of the length 1, so that nobody's arithmetic goes unseen."""
    return struct.pack(f"<{EMBEDDING_SIZE}f", *(sum(token_ids) / (i + 7) for i in range(EMBEDDING_SIZE)))


@dataclass
class PacedWorker:
    """Claims like a worker, and publishes one token per ``pace`` and choice. Stops by itself after ``length``.

    ``logprobs`` are those of each choice's tokens; the prompt's tokens have -1.
    """

    queue: Queue
    token_log: TokenLog
    registry: Registry
    model: str
    length: int = 8
    pace: float = 0.001
    slots: int = 64  # requests at a time
    error: Error | None = None  # instead of the third token
    announced: bool = True
    draining: bool = False
    cached_tokens: int = 0
    logprobs: Sequence[float] = (-0.5,)  # by choice, over again if there are more
    gate: asyncio.Event = field(default_factory=asyncio.Event)  # the first token waits for it
    claims: list[Claim] = field(default_factory=list)
    cancelled: dict[str, float] = field(default_factory=dict)  # when, by id
    lost: set[str] = field(default_factory=set)  # ids
    held: dict[str, int] = field(default_factory=dict)  # id → epoch, until it ended
    steps: int = 0
    leaving: bool = False  # it claims no more, and ends when nothing is held

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            while self.held or not self.leaving:
                await self.announce()
                for claim in await self._claim():
                    self.claims.append(claim)
                    self.held[claim.submission.request_id] = claim.epoch
                    tasks.create_task(self._serve(claim))
                renewal = await self.queue.renew("paced", self.held)
                self.lost |= set(renewal.lost)
                for request_id in renewal.lost:
                    self.held.pop(request_id, None)
                for request_id in renewal.cancelled:
                    self.cancelled.setdefault(request_id, time.monotonic())
                await asyncio.sleep(0.003)

    async def _claim(self) -> list[Claim]:
        return [] if self.leaving else await self.queue.claim("paced", self.slots - len(self.held))

    async def announce(self) -> None:
        self.steps += 1
        if self.announced:
            await self.registry.announce(
                WorkerFacts(
                    worker_id="paced",
                    model=self.model,
                    max_model_len=2048,
                    step_counter=self.steps,
                    num_requests_running=1,
                    draining=self.draining,
                )
            )

    async def _serve(self, claim: Claim) -> None:
        await self.gate.wait()
        await self._emit(claim)
        if self._holds(claim):
            del self.held[claim.submission.request_id]

    def _holds(self, claim: Claim) -> bool:
        """It may have been lost meanwhile, even claimed again."""
        return self.held.get(claim.submission.request_id) == claim.epoch

    async def _emit(self, claim: Claim) -> None:
        log: list[Event] = []
        for i in range(self.length):
            if not self._holds(claim):
                return
            for choice in range(claim.submission.params.n):
                events = self._events(claim, i, choice, log)
                await self._publish(claim, events, len(log) + 1)
                log += events
                if log[-1].terminal:
                    return
            await asyncio.sleep(self.pace)

    def _events(self, claim: Claim, i: int, choice: int, log: list[Event]) -> list[Event]:
        submission = claim.submission
        if submission.request_id in self.cancelled:
            return cancellation(submission, log)
        if self.error and i == 2:
            return [Event(error=self.error)]
        if submission.pooling:
            event = Event(embedding=embedding_of(submission.prompt_token_ids), finish_reason="stop")
            return [self._ended(event, submission, 0)]
        params, num_done = submission.params, 0 if submission.prompt_only else i + 1
        last = i + 1 == min(self.length, params.max_tokens)
        event = Event(
            choice=choice,
            token_ids=[i][:num_done],
            text=word(i) * bool(num_done),
            logprobs=self._logprobs(i, choice, params.logprobs)[:num_done],
            prompt_logprobs=[] if log else self._prompt_logprobs(submission),
            finish_reason=None if not last else "length" if i + 1 == params.max_tokens else "stop",
        )
        return [self._ended(event, submission, num_done) if last and choice + 1 == params.n else event]

    def _logprobs(self, i: int, choice: int, num_top: int | None) -> list[TokenLogprobs]:
        logprob = self.logprobs[choice % len(self.logprobs)]
        return [] if num_top is None else [token_logprobs(i, logprob, num_top)]

    def _prompt_logprobs(self, submission: Submission) -> list[TokenLogprobs | None]:
        num_top = submission.params.prompt_logprobs
        _, *others = submission.prompt_token_ids
        return [] if num_top is None else [None, *(token_logprobs(token_id, -1, num_top) for token_id in others)]

    def _ended(self, event: Event, submission: Submission, num_tokens: int) -> Event:
        num_prompt, num_completion = len(submission.prompt_token_ids), num_tokens * submission.params.n
        usage = Usage(prompt_tokens=num_prompt, completion_tokens=num_completion, cached_tokens=self.cached_tokens)
        return msgspec.structs.replace(event, usage=usage)

    async def _publish(self, claim: Claim, events: list[Event], index: int) -> None:
        publication = Publication(claim.submission.request_id, claim.epoch, index, events)
        if events[-1].terminal:
            await self.token_log.finish("paced", publication)
        else:
            await self.token_log.publish("paced", [publication])


@asynccontextmanager
async def working(server: Endpoint, *, held_back: bool = False, **fields: object) -> AsyncIterator[PacedWorker]:
    """A paced worker for ``server``'s model; ``held_back`` leaves its gate closed.

    What it holds at the end of the block it ends first; behind a closed gate it is left, as by a process that died.
    """
    async with connect(server.settings.redis_url) as redis:
        relay = (redis, server.keys, server.settings)
        worker = PacedWorker(Queue(*relay), TokenLog(*relay), Registry(*relay), server.model, **fields)  # type: ignore[arg-type]
        if not held_back:
            worker.gate.set()
        running = asyncio.create_task(worker.run())
        try:
            yield worker
            worker.leaving = True
            if worker.gate.is_set():
                await asyncio.wait_for(running, 60)
        finally:
            running.cancel()
            await asyncio.wait([running])
        await worker.registry.withdraw("paced")


def sse_events(text: str) -> list[dict[str, str]]:
    """The fields of each event of a whole stream; a comment is the field ``""``."""
    assert text.endswith("\n\n")
    blocks = [block.splitlines() for block in text.split("\n\n")[:-1]]
    return [dict(_field(line) for line in lines) for lines in blocks]


def _field(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name, value.removeprefix(" ")


def refused(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error of a refusal, whose shape every refusal has."""
    assert response.status_code == status, response.text[:300]
    assert len(response.content) < 2000  # no echo of large input
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert isinstance(error["message"], str)
    assert error["code"]
    return dict(error)
