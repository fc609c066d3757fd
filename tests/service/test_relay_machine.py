"""Whatever workers, clients, clocks and the broker do: a log is a prefix of the true output, and ends exactly once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.service.conftest import assert_nothing_stays
from tests.service.relay import ending, publication, submission, token
from tokenrelay.service.broker import connect
from tokenrelay.service.embedded_valkey import EmbeddedValkey
from tokenrelay.service.keys import Keys
from tokenrelay.service.messages import Event, Submission, decode_deliveries, encode
from tokenrelay.service.queue import Claim, Queue
from tokenrelay.service.settings import Settings
from tokenrelay.service.token_log import TokenLog

Result = TypeVar("Result")
WORKERS = ("one", "two")
LENGTHS = st.integers(min_value=0, max_value=5)


class Work:
    """A worker's memory of one claim; kept after the worker was given up, as a paused worker would."""

    def __init__(self, worker_id: str, claim: Claim) -> None:
        self.worker_id = worker_id
        self.claim = claim
        self.request_id = claim.submission.request_id
        self.next = len(claim.log) + 1


class Relay(RuleBasedStateMachine):
    """Two workers that crash, pause and wake, against a real broker that is killed."""

    def __init__(self, broker: EmbeddedValkey) -> None:
        super().__init__()
        self.broker = broker
        self.loop = asyncio.Runner()
        self.redis = self.run(_open(broker.url))
        self.keys = Keys("machine")
        self.queue = Queue(self.redis, self.keys, Settings(lease_seconds=600, max_attempts=3))
        self.log = TokenLog(self.redis, self.keys, Settings())
        self.run(self.redis.flushall())
        self.run(self.redis.xadd(self.keys.mailbox("api"), {"d": b"\x90"}, id="0-*"))
        self.run(self.redis.expire(self.keys.mailbox("api"), 600))
        self.lengths: dict[str, int] = {}  # request → tokens it will emit
        self.submissions: dict[str, Submission] = {}
        self.vanished: set[str] = set()  # ids in the queue whose requests expired
        self.late: set[str] = set()  # ids whose deadline is over, which nobody has noticed yet
        self.owners: dict[str, Work] = {}  # who may write
        self.works: list[Work] = []  # whoever believes to
        self.broker_was_killed = False

    def run(self, step: Coroutine[Any, Any, Result]) -> Result:
        return self.loop.run(step)

    def teardown(self) -> None:
        self.finish_everything()
        self.run(self.redis.flushall())
        self.run(self.redis.aclose())
        self.loop.close()

    @rule(length=LENGTHS, priority=st.integers(-1, 1), tenant=st.sampled_from("ab"))
    def submit(self, length: int, priority: int, tenant: str) -> None:
        request = submission(f"request-{len(self.lengths)}", priority=priority, tenant=tenant, max_tokens=length + 1)
        self.lengths[request.request_id] = length
        self.submit_twice(request)

    @precondition(lambda self: self.lengths.keys() - self.vanished)
    @rule(data=st.data())
    def submit_an_old_id(self, data: st.DataObject) -> None:
        old = data.draw(st.sampled_from(sorted(self.lengths.keys() - self.vanished)))
        assert not self.run(self.queue.submit(submission(old, cache_salt="other"), mailbox="api")).created

    @rule(data=st.data())
    def a_waiting_request_expires(self, data: st.DataObject) -> None:
        """One of which nothing was emitted yet. The queue's entry outlives it."""
        names = [name for name in self.waiting() if name not in self.vanished and not self.run(self.log.read(name))]
        if names:
            name = data.draw(st.sampled_from(sorted(names)))
            self.run(self.redis.delete(self.keys.request(name)))
            self.late.discard(name)
            self.vanished.add(name)

    @precondition(lambda self: self.vanished)
    @rule(data=st.data(), tenant=st.sampled_from("ab"))
    def submit_an_expired_id(self, data: st.DataObject, tenant: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.vanished)))
        self.vanished.remove(name)
        self.submit_twice(submission(name, tenant=tenant, max_tokens=self.lengths[name] + 1))

    @rule(worker_id=st.sampled_from(WORKERS), limit=st.integers(1, 3))
    def claim(self, worker_id: str, limit: int) -> None:
        for claim in self.run(self.queue.claim(worker_id, limit)):
            work = Work(worker_id, claim)
            assert work.request_id not in self.owners.keys() | self.late
            assert claim.log == [self.output(work.request_id, i) for i in range(1, work.next)]
            self.owners[work.request_id] = work
            self.works.append(work)

    @rule(worker_id=st.sampled_from(WORKERS), repeated=st.booleans())
    def step(self, worker_id: str, repeated: bool) -> None:
        """One engine step of everything the worker believes to work on, its lost requests included."""
        mine = [work for work in self.works if work.worker_id == worker_id]
        self.publish([work for work in mine if work.next <= self.lengths[work.request_id]], repeated)
        for work in mine:
            if work.next == self.lengths[work.request_id] + 1:
                self.finish(work, repeated)

    @rule(worker_id=st.sampled_from(WORKERS))
    def leases_expire(self, worker_id: str) -> None:
        """The worker crashed or pauses; what it still believes stays in ``works``."""
        lost = [name for name, work in self.owners.items() if work.worker_id == worker_id]
        for name in lost:
            self.run(self.redis.zadd(self.keys.leases, {name: 1}, xx=True))
        assert set(self.run(self.queue.reclaim())) == set(lost)
        for name in lost:
            del self.owners[name]

    @rule(worker_id=st.sampled_from(WORKERS))
    def drain(self, worker_id: str) -> None:
        """Hand back everything; what is no longer this worker's must not move."""
        for work in [work for work in self.works if work.worker_id == worker_id]:
            self.run(self.queue.release(worker_id, work.request_id, work.claim.epoch))
            if self.owners.get(work.request_id) is work:
                del self.owners[work.request_id]

    @precondition(lambda self: self.lengths)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.lengths)))
        outcome = self.run(self.queue.cancel(name))
        assert (outcome == "running") == (name in self.owners)

    @precondition(lambda self: self.lengths.keys() - self.vanished)
    @rule(data=st.data())
    def a_deadline_passes(self, data: st.DataObject) -> None:
        """Of a request that waits, or is worked on, or has ended."""
        name = data.draw(st.sampled_from(sorted(self.lengths.keys() - self.vanished)))
        self.run(self.redis.hset(self.keys.request(name), "deadline", 1))
        self.run(self.redis.zadd(self.keys.deadlines, {name: 1}))
        self.late.add(name)

    @rule()
    def deadlines_are_noticed(self) -> None:
        """What is late belongs to nobody then."""
        self.run(self.queue.expire())
        for name in self.late:
            self.owners.pop(name, None)
        self.late.clear()
        assert self.run(self.redis.exists(self.keys.deadlines)) == 0

    @precondition(lambda self: not self.broker_was_killed)  # once is enough, and takes its time
    @rule()
    def the_broker_is_killed(self) -> None:
        """And started again: what it acknowledged is there, or one of the invariants misses it."""
        self.broker_was_killed = True
        assert self.broker.pid
        os.kill(self.broker.pid, signal.SIGKILL)
        self.broker.wait(60)
        self.broker.start()

    @rule(worker_id=st.sampled_from(WORKERS))
    def renew(self, worker_id: str) -> None:
        """Of two claims of the same request a worker remembers the later one."""
        held = {work.request_id: work for work in self.works if work.worker_id == worker_id}
        renewal = self.run(self.queue.renew(worker_id, {name: work.claim.epoch for name, work in held.items()}))
        assert set(renewal.lost) == {name for name, work in held.items() if not self.is_owner_or_ended_it(work)}

    @invariant()
    def the_load_is_what_waits(self) -> None:
        """Not only roughly, and whoever took something out of the queue, or put it back."""
        expected: Counter[bytes] = Counter()
        for name in self.waiting():
            request = self.submissions[name]
            expected[b"tokens"] += request.cost
            expected[b"bytes"] += len(encode(request))
            expected[b"requests:" + request.tenant.encode()] += 1
            expected[b"tokens:" + request.tenant.encode()] += request.cost
        assert self.run(self.redis.hgetall(self.keys.load)) == {name: b"%d" % sum for name, sum in expected.items()}
        assert {name.decode() for name in self.run(self.redis.hkeys(self.keys.sizes))} == set(self.waiting())

    @invariant()
    def logs_are_prefixes_and_end_once(self) -> None:
        delivered = self.run(_delivered(self))
        for name in self.lengths.keys() - self.vanished:
            entries = self.run(self.log.read(name))
            assert [index for index, _ in entries] == list(range(1, len(entries) + 1))
            assert delivered.get(name, []) == entries
            events = [event for _, event in entries]
            assert not any(event.terminal for event in events[:-1])
            ended_early = events and (events[-1].error or events[-1].finish_reason == "cancelled")
            emitted = events[:-1] if ended_early else events
            assert emitted == [self.output(name, i) for i in range(1, len(emitted) + 1)]

    def submit_twice(self, request: Submission) -> None:
        self.submissions[request.request_id] = request
        for _ in range(2):  # sent again after a lost reply
            assert self.run(self.queue.submit(request, mailbox="api")).created

    def waiting(self) -> list[str]:
        return [name.decode() for name in self.run(self.redis.zrange(self.keys.waiting, 0, -1))]

    def output(self, name: str, index: int) -> Event:
        """The true output: a function of the request and the index, whoever computes it."""
        length = self.lengths[name]
        return token(index) if index <= length else ending(length)

    def publish(self, works: list[Work], repeated: bool) -> None:
        step = [publication(work.claim, work.next, self.output(work.request_id, work.next)) for work in works]
        refused = [self.run(self.log.publish(works[0].worker_id, step)) for _ in range(1 + repeated)] if step else [[]]
        for work in works:
            if self.owners.get(work.request_id) is work:
                work.next += 1
        assert set(refused[0]) == set(refused[-1])
        assert {work.request_id for work in works if self.owners.get(work.request_id) is not work} >= set(refused[0])

    def finish(self, work: Work, repeated: bool) -> None:
        step = publication(work.claim, work.next, self.output(work.request_id, work.next))
        accepted = [self.run(self.log.finish(work.worker_id, step)) for _ in range(1 + repeated)]
        assert accepted[0] == accepted[-1] == (self.owners.get(work.request_id) is work)
        if accepted[0]:
            del self.owners[work.request_id]
            work.next += 1

    def is_owner_or_ended_it(self, work: Work) -> bool:
        return self.owners.get(work.request_id) is work or work.next > self.lengths[work.request_id] + 1

    def finish_everything(self) -> None:
        """A new worker comes: every request ends, and nothing is left of any."""
        for worker_id in WORKERS:
            self.leases_expire(worker_id)
        self.works.clear()
        self.deadlines_are_noticed()
        while self.run(self.queue.num_waiting()):
            self.claim("one", 3)
            while any(work.request_id in self.owners for work in self.works):
                self.step("one", repeated=False)
        self.logs_are_prefixes_and_end_once()
        for name in self.lengths.keys() - self.vanished:
            assert self.run(self.log.read(name))[-1][1].terminal
        assert self.run(self.redis.exists(self.keys.leases, self.keys.waiting, self.keys.sizes, self.keys.load)) == 0


async def _open(url: str) -> Any:
    return connect(url)


async def _delivered(relay: Relay) -> dict[str, list[tuple[int, Event]]]:
    """What the mailbox's reader saw, by request."""
    seen: dict[str, list[tuple[int, Event]]] = {}
    for _, fields in await relay.redis.xrange(relay.keys.mailbox("api")):
        for delivery in decode_deliveries(fields[b"d"]):
            seen.setdefault(delivery.request_id, []).append((delivery.index, delivery.event))
    return seen


def check(broker: EmbeddedValkey, max_examples: int) -> None:
    run_state_machine_as_test(
        lambda: Relay(broker),  # type: ignore[arg-type]
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            print_blob=True,
        ),
    )


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    """Of its own: its append-only file is short, so it is soon back."""
    broker = EmbeddedValkey(tmp_path, memory_mb=64)
    broker.start()
    yield broker
    assert_nothing_stays(broker.url)
    broker.stop()


def test_relay(broker: EmbeddedValkey) -> None:
    check(broker, max_examples=40)


@pytest.mark.long
def test_relay_for_long(broker: EmbeddedValkey) -> None:
    check(broker, max_examples=1000)
