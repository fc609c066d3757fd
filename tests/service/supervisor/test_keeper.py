"""A process is kept running, replaced without a gap, and given up when it never comes up."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable

import psutil
import pytest

from tokenrelay.service.supervisor import keeper
from tokenrelay.service.supervisor.child import Child, start_child
from tokenrelay.service.supervisor.crew import Crew
from tokenrelay.service.supervisor.keeper import MAX_FAILED_STARTS, GaveUp, Keeper

READY = "import os, sys, time; os.write(int(sys.argv[-1]), b'\\n'); time.sleep(600)"
STILLBORN = "import sys; sys.exit(3)"
DEAF = "import signal, os, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + READY


class Place:
    """Where a keeper keeps a process. ``program`` is what the next one will run."""

    def __init__(self, program: str = READY, drain_seconds: float = 10.0) -> None:
        self.program = program
        self.children: list[Child] = []
        self.buried: list[Child] = []
        self.started = asyncio.Event()
        self.keeper = Keeper("process", self._start, self._bury, drain_seconds)

    async def _start(self) -> Child:
        child = await start_child([sys.executable, "-c", self.program], os.environ)
        self.children.append(child)
        self.started.set()
        return child

    async def _bury(self, child: Child) -> None:
        self.buried.append(child)

    async def next_child(self) -> Child:
        async with asyncio.timeout(60):
            await self.started.wait()
        self.started.clear()
        return self.children[-1]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "BACKOFF_BASE", 0.001)


async def kept(place: Place, body: Callable[[Child], Awaitable[None]]) -> None:
    """Run ``body`` with the first child once that is ready; stop in the end."""
    running = asyncio.create_task(place.keeper.run())
    child = await place.next_child()
    assert await child.ready()
    await body(child)
    await place.keeper.stop()
    await running
    assert not any(psutil.pid_exists(child.pid) for child in place.children)


async def test_what_dies_is_buried_and_started_again() -> None:
    place = Place()

    async def body(first: Child) -> None:
        os.kill(first.pid, signal.SIGKILL)
        second = await place.next_child()
        assert await second.ready()
        assert place.buried == [first]

    await kept(place, body)


async def test_it_is_restarted_however_often_it_dies_after_it_was_ready() -> None:
    """Or a request that kills workers could end the service."""
    place = Place()

    async def body(child: Child) -> None:
        for _ in range(MAX_FAILED_STARTS + 1):
            os.kill(child.pid, signal.SIGKILL)
            child = await place.next_child()
            assert await child.ready()

    await kept(place, body)


async def test_what_never_comes_up_is_given_up() -> None:
    place = Place(STILLBORN)
    with pytest.raises(GaveUp, match="did not come up"):
        await place.keeper.run()
    assert len(place.children) == MAX_FAILED_STARTS
    assert not any(child.was_ready for child in place.children)


async def test_the_pause_before_a_restart_doubles_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(keeper, "BACKOFF_BASE", 0.1)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    backoff = keeper.Backoff("process")
    for _ in range(8):
        await backoff.pause(was_ready=True)
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0])


async def test_a_successor_is_ready_before_the_old_one_is_stopped() -> None:
    place = Place()

    async def body(old: Child) -> None:
        replacing = asyncio.create_task(place.keeper.replace())
        place.started.clear()
        new = await place.next_child()
        assert psutil.pid_exists(old.pid)
        assert await new.ready()
        await replacing
        assert not psutil.pid_exists(old.pid)
        os.kill(new.pid, signal.SIGKILL)
        assert await (await place.next_child()).ready()  # the successor is kept like the first

    await kept(place, body)


async def test_a_successor_that_does_not_come_up_leaves_the_old_one_alone() -> None:
    place = Place()

    async def body(old: Child) -> None:
        place.program = STILLBORN
        with pytest.raises(GaveUp, match="the old one goes on"):
            await place.keeper.replace()
        assert psutil.Process(old.pid).is_running()

    await kept(place, body)


async def test_one_that_does_not_drain_in_time_is_killed_and_buried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "KILL_SECONDS", 0.1)
    place = Place(DEAF, drain_seconds=0)

    async def body(deaf: Child) -> None:
        place.program = READY
        await place.keeper.replace()
        assert place.buried == [deaf]

    await kept(place, body)


class _Nothing:
    """Cannot even start."""

    name = "nothing"

    def __init__(self) -> None:
        self.stopped = False

    async def run(self) -> None:
        raise FileNotFoundError("no such program")

    async def replace(self) -> None: ...

    async def stop(self) -> None:
        self.stopped = True


async def test_a_keeper_that_dies_ends_the_service_with_1() -> None:
    place, broken = Place(), _Nothing()
    async with asyncio.timeout(60):
        assert await Crew([[place.keeper], [broken]]).run() == 1
    assert broken.stopped
    assert not any(psutil.pid_exists(child.pid) for child in place.children)


async def test_a_crew_stops_with_0_when_it_is_told_to() -> None:
    place = Place()
    crew = Crew([[place.keeper]])
    running = asyncio.create_task(crew.run())
    await (await place.next_child()).ready()
    crew.stop()
    assert await running == 0


def test_nothing_is_left_behind() -> None:
    """Pipes and sockets of the children are closed with them."""

    async def start_and_stop() -> int:
        place = Place()
        running = asyncio.create_task(place.keeper.run())
        await (await place.next_child()).ready()
        await place.keeper.stop()
        await running
        return psutil.Process().num_fds()

    async def twice() -> tuple[int, int]:
        return await start_and_stop(), await start_and_stop()

    first, second = asyncio.run(twice())
    assert second <= first  # what earlier tests left may be closed meanwhile
