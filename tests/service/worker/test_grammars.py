"""Grammars in a worker: compiled beside the engine, and a bad one ends its own request only."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from tokenrelay.model.config import EngineConfig
from tokenrelay.model.engine.engine import Engine
from tokenrelay.model.engine.scheduler import Scheduler
from tokenrelay.model.engine.step import Sampled, SchedulerOutput
from tokenrelay.model.sampling_params import SamplingParams
from tokenrelay.model.structured import grammars
from tokenrelay.model.structured.compiler import GrammarCompiler
from tokenrelay.model.structured.errors import GrammarError
from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.model.weights import resolve
from tokenrelay.service.messages import Error, Event, Submission
from tokenrelay.service.metrics import WorkerMetrics
from tokenrelay.service.queue import Claim
from tokenrelay.service.settings import Settings
from tokenrelay.service.token_log import Publication
from tokenrelay.service.worker.engine_thread import EngineThread
from tokenrelay.service.worker.output_processor import OutputProcessor
from tokenrelay.service.worker.worker import Worker

PLAIN = 36  # what is written without a grammar


class FirstAllowed:
    """Instead of a network: always the first token that may come."""

    def execute(self, output: SchedulerOutput) -> list[Sampled]:
        return [self._next(entry.request.constraint) if entry.samples else Sampled() for entry in output.scheduled]

    def _next(self, constraint: Any) -> Sampled:
        if constraint is None:
            return Sampled((PLAIN,))
        bits = np.unpackbits(constraint.masks(())[0].view(np.uint8), bitorder="little")
        return Sampled((int(bits.argmax()),))


class Running:
    """An engine's thread, and what it publishes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        eos = tokenizer.eos_token_ids
        engine = Engine(Scheduler(EngineConfig(), 64, 512, eos), FirstAllowed(), 512)  # type: ignore[arg-type]
        self.published: queue.SimpleQueue[list[Publication]] = queue.SimpleQueue()
        self.thread = EngineThread(
            engine,
            OutputProcessor(tokenizer, eos),
            WorkerMetrics(CollectorRegistry(), "m"),
            publish=self.published.put,
            on_death=lambda error: None,
        )

    def ends(self, *request_ids: str) -> dict[str, list[Event]]:
        """The events of these requests, once each has its last."""
        events: dict[str, list[Event]] = {request_id: [] for request_id in request_ids}
        while not all(found and found[-1].terminal for found in events.values()):
            for publication in self.published.get(timeout=60):
                events[publication.request_id] += publication.events
            self.thread.published()
        return events


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.from_source(resolve(str(smollm2_path)))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


@pytest.fixture
def running(tokenizer: Tokenizer) -> Iterator[Running]:
    running = Running(tokenizer)
    running.thread.start()
    yield running
    running.thread.stop()
    running.thread.join(60)


def claim_of(request_id: str, grammar: str = "", *, n: int = 1, log: list[Event] | None = None) -> Claim:
    params = SamplingParams(max_tokens=64, grammar=grammar, n=n)
    return Claim(Submission(request_id=request_id, prompt_token_ids=[1, 2], params=params), 1, 1, log or [], 0.0)


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events)


def test_every_choice_follows_the_grammar(running: Running, compiler: GrammarCompiler) -> None:
    grammar = grammars.choice(["a single answer"])
    running.thread.add(claim_of("r", grammar, n=2), compiler.compile(grammar))
    events = running.ends("r")["r"]
    for choice in (0, 1):
        assert text_of([event for event in events if event.choice == choice]) == "a single answer"
    assert events[-1].finish_reason == "stop"


def test_a_resumed_request_goes_on_inside_the_grammar(
    running: Running, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    grammar = grammars.choice(["a single answer", "another"])
    begun = tokenizer.encode("a single", add_special_tokens=False)
    log = [Event(choice=0, token_ids=begun, text="a single")]
    running.thread.add(claim_of("r", grammar, log=log), compiler.compile(grammar))
    assert text_of(running.ends("r")["r"]) == " answer"


DEAD_END = grammars.lark("start: /[ab]{40}/ NOTHING\nNOTHING: /c/ & /d/")  # which shows after 40 letters


def test_a_grammar_that_cannot_be_followed_any_further_ends_its_request_alone(
    running: Running, compiler: GrammarCompiler
) -> None:
    compiled = compiler.compile(DEAD_END)
    running.thread.add(claim_of("plain"))
    running.thread.add(claim_of("stuck", DEAD_END, n=2), compiled)
    events = running.ends("plain", "stuck")
    assert len(events["plain"]) == 64
    error = events["stuck"][-1].error
    assert error is not None
    assert (error.code, error.status) == ("invalid_grammar", 400)
    assert "nothing that it allows" in error.message
    assert not any(event.finish_reason for event in events["stuck"])
    again = grammars.regex("again")
    running.thread.add(claim_of("next", again), compiler.compile(again))
    assert text_of(running.ends("next")["next"]) == "again"


class Recorder:
    """In the place of the engine's thread."""

    def __init__(self) -> None:
        self.added: list[str] = []
        self.refused: dict[str, str] = {}

    def add(self, claim: Claim, grammar: object = None) -> None:
        assert bool(grammar) == bool(claim.submission.params.grammar)
        self.added.append(claim.submission.request_id)

    def refuse(self, claim: Claim, error: Any) -> None:
        self.refused[claim.submission.request_id] = error.code


class SlowCompiler:
    """Compiles when told to; what it calls bad is refused."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def compile(self, grammar: str) -> object:
        assert self.gate.wait(60)
        if grammar == "bad":
            raise GrammarError("it is bad")
        return object()


async def test_only_requests_with_a_grammar_wait_for_it() -> None:
    worker, engine, compiler = worker_of()
    for claim in (claim_of("slow", "good"), claim_of("refused", "bad"), claim_of("lost", "good"), claim_of("plain")):
        worker._held.add(claim)
        worker._preparations.start(claim)
    assert engine.added == ["plain"]
    worker._held.forget("lost", epoch=1)
    compiler.gate.set()
    await asyncio.gather(*worker._preparations.tasks.values())
    assert engine.added == ["plain", "slow"]
    assert engine.refused == {"refused": "invalid_grammar"}


def test_a_refused_request_has_one_event(running: Running) -> None:
    failure = Error(message="It is bad.", code="invalid_grammar", status=400)
    running.thread.refuse(claim_of("r", "bad", n=2), failure)
    assert running.ends("r") == {"r": [Event(error=failure)]}


def worker_of() -> tuple[Worker, Recorder, SlowCompiler]:
    nothing: Any = SimpleNamespace(max_model_len=64)
    recorder, compiler = Recorder(), SlowCompiler()
    worker = Worker(
        nothing,
        nothing,
        compiler,  # type: ignore[arg-type]
        nothing,
        nothing,
        nothing,
        nothing,
        Settings(),
        "m",
    )
    worker._preparations._engine = recorder  # type: ignore[assignment]
    return worker, recorder, compiler
