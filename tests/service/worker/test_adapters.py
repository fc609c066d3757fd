"""LoRA adapters in a worker: loaded when a request needs one, few at a time, the same wherever a request goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.model.peft_adapter import LLAMA, PeftAdapter
from tests.model.weights.networks import tiny_llama
from tests.service.conftest import WaitUntil
from tests.service.relay import claim_one, publication
from tests.service.worker.working import working
from tokenrelay.model.config import EngineConfig
from tokenrelay.model.engine.engine import Engine
from tokenrelay.model.engine.request import Request
from tokenrelay.model.sampling_params import SamplingParams
from tokenrelay.model.weights.lora import digest_of
from tokenrelay.service.keys import Keys
from tokenrelay.service.messages import ADAPTER_VERSION, VERSION, Adapter, Event, Submission
from tokenrelay.service.queue import Queue
from tokenrelay.service.settings import Settings
from tokenrelay.service.token_log import TokenLog
from tokenrelay.service.worker.adapter_shelf import AdapterShelf
from tokenrelay.service.worker.role import Role

PROMPT = [5, 17, 60, 33, 2, 8, 41, 77]
PARAMS = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder


def adapter_at(folder: Path, name: str) -> Adapter:
    return Adapter(name=name, path=str(folder), digest=digest_of(folder))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    names = ["one", "two", "three"]
    return [
        adapter_at(PeftAdapter(tiny_llama(), LLAMA, seed=seed).save(tmp_path_factory.mktemp(name)), name)
        for seed, name in enumerate(names)
    ]


def engine_of(base: Path) -> Engine:
    return Engine.from_model(str(base), EngineConfig(num_blocks=64), dtype="float32", device="cpu")


def alone(base: Path, adapter: Adapter | None) -> list[int]:
    """What a request gives when nothing happens."""
    engine = engine_of(base)
    if adapter:
        engine.runner.adapters.add(adapter.digest, engine.read_adapter(Path(adapter.path), adapter.digest, 64))
    engine.add(Request("r", PROMPT, PARAMS, adapter=adapter.digest if adapter else ""))
    ids: list[int] = []
    while engine.has_work:
        ids += [token_id for output in engine.step() for token_id in output.token_ids]
    return ids


async def submit(queue: Queue, request_id: str, adapter: Adapter | None) -> None:
    submission = Submission(
        request_id=request_id,
        prompt_token_ids=PROMPT,
        params=PARAMS,
        adapter=adapter,
        version=ADAPTER_VERSION if adapter else VERSION,
    )
    await queue.submit(submission, mailbox="api")


async def ended(token_log: TokenLog, request_id: str, wait_until: WaitUntil) -> list[Event]:
    async def is_ended() -> bool:
        entries = await token_log.read(request_id)
        return bool(entries) and entries[-1][1].terminal

    await wait_until(is_ended)
    return [event for _, event in await token_log.read(request_id)]


def ids_of(events: list[Event]) -> list[int]:
    return [token_id for event in events for token_id in event.token_ids]


async def test_more_adapters_than_fit_take_turns(
    redis: Redis,
    keys: Keys,
    settings: Settings,
    queue: Queue,
    token_log: TokenLog,
    wait_until: WaitUntil,
    base: Path,
    adapters: list[Adapter],
) -> None:
    asked = {f"{turn} {i}": adapter for turn in range(2) for i, adapter in enumerate([None, *adapters])}
    for request_id, adapter in asked.items():
        await submit(queue, request_id, adapter)
    settings = settings.model_copy(update={"max_loras": 1})
    expected = {adapter and adapter.name: alone(base, adapter) for adapter in (None, *adapters)}
    engine = engine_of(base)
    async with working(redis, keys, settings, Role("worker"), engine=engine):
        for request_id, adapter in asked.items():
            events = await ended(token_log, request_id, wait_until)
            assert ids_of(events) == expected[adapter and adapter.name]
    assert sum(adapter.digest in engine.runner.adapters for adapter in adapters) == 1
    assert len({tuple(ids) for ids in expected.values()}) == 4


async def test_another_worker_goes_on_with_the_same_adapter(
    redis: Redis,
    keys: Keys,
    settings: Settings,
    queue: Queue,
    token_log: TokenLog,
    wait_until: WaitUntil,
    base: Path,
    adapters: list[Adapter],
) -> None:
    """It has never heard of it."""
    expected = alone(base, adapters[0])
    await submit(queue, "r", adapters[0])
    claim = await claim_one(queue, "dying")
    await token_log.publish("dying", [publication(claim, 1, Event(token_ids=expected[:5], text="xxxxx"))])
    await queue.evict("dying")
    async with working(redis, keys, settings, Role("other"), engine=engine_of(base)):
        assert ids_of(await ended(token_log, "r", wait_until)) == expected


@pytest.mark.parametrize("change", ["content", "gone"])
async def test_an_adapter_that_is_not_what_it_was_fails_its_requests_alone(
    redis: Redis,
    keys: Keys,
    settings: Settings,
    queue: Queue,
    token_log: TokenLog,
    wait_until: WaitUntil,
    base: Path,
    tmp_path: Path,
    change: str,
) -> None:
    adapter = adapter_at(PeftAdapter(tiny_llama(), LLAMA, seed=1).save(tmp_path / "one"), "one")
    if change == "content":
        PeftAdapter(tiny_llama(), LLAMA, seed=2).save(tmp_path / "one")
    else:
        (tmp_path / "one").rename(tmp_path / "other")
    await submit(queue, "adapted", adapter)
    await submit(queue, "plain", None)
    async with working(redis, keys, settings, Role("worker"), engine=engine_of(base)):
        [event] = await ended(token_log, "adapted", wait_until)
        assert event.error is not None
        assert (event.error.code, event.error.status) == ("adapter_unavailable", 500)
        assert str(tmp_path) not in event.error.message
        assert ids_of(await ended(token_log, "plain", wait_until)) == alone(base, None)


async def test_who_waits_for_an_adapter_can_be_cancelled(
    redis: Redis,
    keys: Keys,
    settings: Settings,
    queue: Queue,
    token_log: TokenLog,
    wait_until: WaitUntil,
    base: Path,
    adapters: list[Adapter],
) -> None:
    settings = settings.model_copy(update={"max_loras": 1})
    async with working(redis, keys, settings, Role("worker"), engine=engine_of(base)) as hand:
        shelf = hand.worker._shelf
        await shelf.take(adapters[0], ("stays", 1))
        await submit(queue, "r", adapters[1])

        async def waits() -> bool:
            return shelf.is_full

        await wait_until(waits)
        await queue.cancel("r")
        [event] = await ended(token_log, "r", wait_until)
        assert event.finish_reason == "cancelled"
        await submit(queue, "next", adapters[0])
        assert ids_of(await ended(token_log, "next", wait_until)) == alone(base, adapters[0])


class Recorder:
    """In the place of the engine's thread."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def add_adapter(self, adapter_id: str, adapter: Any) -> None:
        assert adapter == f"weights of {adapter_id}"
        self.loaded.append(adapter_id)

    def remove_adapter(self, adapter_id: str) -> None:
        self.loaded.remove(adapter_id)


def shelf_of(max_loras: int) -> tuple[AdapterShelf, Recorder, Callable[[str, str], Coroutine[Any, Any, None]]]:
    """And how a request takes an adapter."""
    recorder = Recorder()
    load: Any = lambda adapter: f"weights of {adapter.digest}"  # noqa: E731
    shelf = AdapterShelf(recorder, load, max_loras)  # type: ignore[arg-type]

    async def take(digest: str, user: str) -> None:
        await shelf.take(Adapter(name=digest, path="", digest=digest), (user, 1))

    return shelf, recorder, take


async def test_the_least_recently_used_one_makes_room() -> None:
    shelf, engine, take = shelf_of(2)
    for digest in ("a", "b", "a"):
        await take(digest, digest)
        shelf.release((digest, 1))
    await take("c", "c")
    assert engine.loaded == ["a", "c"]


async def test_one_in_use_stays_and_the_first_to_wait_is_the_first_served(wait_until: WaitUntil) -> None:
    shelf, engine, take = shelf_of(1)
    await take("a", "first")
    second = asyncio.create_task(take("b", "second"))

    async def waits() -> bool:
        return shelf.is_full

    await wait_until(waits)
    third = asyncio.create_task(take("a", "third"))  # it is there, but would go on for ever in the second's way
    await asyncio.sleep(0)
    assert engine.loaded == ["a"]
    shelf.release(("first", 2))  # of another claim
    await asyncio.sleep(0)
    assert not second.done()
    shelf.release(("first", 1))
    await second
    assert engine.loaded == ["b"]
    assert not third.done()
    shelf.release(("second", 1))
    await third
    assert (engine.loaded, shelf.is_full) == (["a"], False)
