"""What a worker tells of requests that have no tokens to show: how far their prompts are, and what was preempted."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from tests.service.conftest import WaitUntil
from tests.service.worker.working import CONTEXT, working
from tokenrelay.model.config import EngineConfig
from tokenrelay.model.engine.request import Request
from tokenrelay.model.engine.scheduler import Scheduler
from tokenrelay.model.engine.step import Sampled
from tokenrelay.model.sampling_params import SamplingParams
from tokenrelay.service.keys import Keys
from tokenrelay.service.messages import Submission
from tokenrelay.service.queue import Queue
from tokenrelay.service.request_records import RequestRecords
from tokenrelay.service.settings import Settings
from tokenrelay.service.terms import AnswerSpec, Terms
from tokenrelay.service.token_log import Progress
from tokenrelay.service.worker.progress import ProgressMeter
from tokenrelay.service.worker.role import Role


def scheduler(num_blocks: int) -> Scheduler:
    return Scheduler(EngineConfig(max_num_seqs=4, max_num_batched_tokens=32), num_blocks, 512, [])


def step(of: Scheduler) -> None:
    output = of.schedule()
    of.update(output, [Sampled((7,)) if entry.samples else Sampled() for entry in output.scheduled])


def seen(of: Scheduler, epochs: dict[str, int]) -> dict[str, Progress]:
    meter = ProgressMeter()
    meter.look(of)
    return meter.news(epochs)


def request(name: str, num_tokens: int, max_tokens: int = 400) -> Request:
    return Request(name, list(range(1, num_tokens + 1)), SamplingParams(max_tokens=max_tokens))


def test_a_prompt_in_chunks() -> None:
    engine = scheduler(num_blocks=64)
    engine.add(request("a/0", 80))
    assert seen(engine, {"a": 5}) == {"a": Progress(5, 0, 0, False)}
    step(engine)
    assert seen(engine, {"a": 5}) == {"a": Progress(5, 32, 0, True)}
    step(engine)
    assert seen(engine, {"a": 5}) == {"a": Progress(5, 64, 0, True)}
    step(engine)
    assert seen(engine, {"a": 5}) == {}  # it has its first token: the log tells the rest
    assert seen(engine, {}) == {}


def test_choices_of_a_request_are_one() -> None:
    engine = scheduler(num_blocks=64)
    for choice in range(2):
        engine.add(request(f"a/{choice}", 80))
    step(engine)
    assert seen(engine, {"a": 1}) == {"a": Progress(1, 32, 0, True)}


def test_a_preemption() -> None:
    engine = scheduler(num_blocks=8)
    engine.add(request("a/0", 40))
    engine.add(request("b/0", 41))
    while not engine.num_preemptions:
        step(engine)
    [(name, progress)] = seen(engine, {"a": 1, "b": 1}).items()
    assert (name, progress.num_preemptions, progress.running) == ("b", 1, False)


def test_only_news_is_told() -> None:
    engine, meter = scheduler(num_blocks=64), ProgressMeter()
    engine.add(request("a/0", 80))
    meter.look(engine)
    assert meter.news({"a": 1}) == {"a": Progress(1, 0, 0, False)}
    assert meter.news({"a": 1}) == {}
    assert meter.news({"a": 2}) == {"a": Progress(2, 0, 0, False)}  # lost, and claimed again


def test_the_scheduler_is_looked_at_a_few_times_a_second() -> None:
    """Steps may take a millisecond, and hold hundreds of requests."""
    engine, meter = scheduler(num_blocks=64), ProgressMeter()
    meter.look(engine)
    engine.add(request("a/0", 80))
    meter.look(engine)
    assert meter.news({"a": 1}) == {}


# --- a whole worker ---------------------------------------------------------------------------------------------------


async def submit(queue: Queue, name: str, prompt: list[int], max_tokens: int, seconds: float = 0) -> None:
    submission = Submission(request_id=name, prompt_token_ids=prompt, params=SamplingParams(max_tokens=max_tokens))
    answer = AnswerSpec(route="completion", model="m", created=0, num_prompt_tokens=len(prompt))
    await queue.submit(submission, mailbox="api", terms=Terms(answer, seconds))


@pytest.fixture
def records(redis: Redis, keys: Keys) -> RequestRecords:
    return RequestRecords(redis, keys)


async def test_the_timeline_tells_of_preemptions(
    redis: Redis,
    keys: Keys,
    settings: Settings,
    queue: Queue,
    records: RequestRecords,
    wait_until: WaitUntil,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three requests that grow beyond the cache together. The network takes no time, so it is looked at more often."""
    for module in ("progress", "worker"):
        monkeypatch.setattr(f"tokenrelay.service.worker.{module}.LOOK_SECONDS", 0.005)
    names = ["a", "b", "c"]

    async def all_ended() -> bool:
        return all([(await records.read(name)).state == "finished" for name in names])

    async with working(redis, keys, settings, Role("worker")):
        for i, name in enumerate(names):
            await submit(queue, name, [i + 1] * 200, CONTEXT - 200)
        await wait_until(all_ended)
    timelines = [(await records.read(name)).timeline for name in names]
    for timeline in timelines:
        assert [moment.at for moment in timeline] == sorted(moment.at for moment in timeline)
        happened = [moment.event for moment in timeline]
        assert (happened[:3], happened[-1]) == (["queued", "claimed", "first_token"], "finished")
    assert {"preempted", "resumed"} < {moment.event for timeline in timelines for moment in timeline}


async def test_a_late_request_costs_no_computing(
    redis: Redis, keys: Keys, settings: Settings, queue: Queue, records: RequestRecords, wait_until: WaitUntil
) -> None:
    """It waited for too long: the worker that comes then never sees it."""
    await submit(queue, "late", [1] * 400, 10, seconds=0.01)
    await submit(queue, "other", [1] * 30, 10)

    async def is_late() -> bool:
        return await queue.expire("late") is None

    async def other_ended() -> bool:
        return (await records.read("other")).state == "finished"

    await wait_until(is_late)
    async with working(redis, keys, settings, Role("worker")) as hand:
        await wait_until(other_ended)
        assert hand.worker._engine._engine.scheduler.num_scheduled_tokens < 100


async def test_a_request_that_is_late_at_work_is_dropped(
    redis: Redis, keys: Keys, settings: Settings, queue: Queue, records: RequestRecords, wait_until: WaitUntil
) -> None:
    """Its blocks are free long before the worker's next heartbeat."""
    assert settings.heartbeat_seconds > 100

    async def is_late() -> bool:
        return await queue.expire("a") is None

    async with working(redis, keys, settings, Role("worker")) as hand:

        async def is_dropped() -> bool:
            return not len(hand.held) and not hand.worker._engine.state.num_running

        hand.network.gate.clear()
        await submit(queue, "a", [1] * 100, 400, seconds=0.2)
        await wait_until(is_late)
        hand.network.gate.set()
        await wait_until(is_dropped)
    assert (await records.read("a")).state == "finished"
