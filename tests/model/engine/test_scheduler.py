"""The scheduler alone, with a network that needs no tensors: the next token is a function of the sequence."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tokenrelay.model.config import EngineConfig
from tokenrelay.model.engine.request import Request
from tokenrelay.model.engine.scheduler import ScheduledRequest, Scheduler, StepOutput
from tokenrelay.model.sampling_params import FinishReason, SamplingParams

EOS = 0
MAX_MODEL_LEN = 64


def next_token(token_ids: Sequence[int]) -> int:
    """What the fake network says after a sequence: depends on all of it, and ends now and then."""
    return hash(tuple(token_ids)) % 50


def undisturbed(request: Request) -> list[int]:
    """The oracle: what the request generates when it is alone and nothing happens."""
    token_ids = list(request.token_ids[: request.num_prompt_tokens])
    output: list[int] = []
    while len(output) < request.params.max_tokens and len(token_ids) < MAX_MODEL_LEN:
        token = next_token(token_ids)
        token_ids.append(token)
        output.append(token)
        if token == EOS:
            break
    return output


def make_scheduler(num_blocks: int = 16, *, max_num_seqs: int = 4, max_num_batched_tokens: int = 16) -> Scheduler:
    config = EngineConfig(block_size=4, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
    return Scheduler(config, num_blocks, MAX_MODEL_LEN, [EOS])


def make_request(name: str, prompt: Sequence[int], max_tokens: int = 8) -> Request:
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens))


def sampled_by(entry: ScheduledRequest) -> int | None:
    return next_token(entry.request.token_ids) if entry.samples else None


def step(scheduler: Scheduler) -> list[StepOutput]:
    output = scheduler.schedule()
    assert output.scheduled, "work without progress"
    return scheduler.update(output, [sampled_by(entry) for entry in output.scheduled])


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16)
    scheduler.add(make_request("a", range(1, 41)))
    chunks = []
    while not any(step(scheduler)):
        chunks.append(scheduler.running[0].num_computed_tokens)
    assert chunks == [16, 32]


def test_a_running_request_gets_its_token_beside_a_long_prompt() -> None:
    scheduler = make_scheduler(num_blocks=32, max_num_batched_tokens=8)
    scheduler.add(make_request("short", [1, 2]))
    step(scheduler)
    scheduler.add(make_request("long", range(1, 41)))
    for _ in range(3):
        output = scheduler.schedule()
        assert [(e.request.request_id, e.num_tokens) for e in output.scheduled] == [("short", 1), ("long", 7)]
        scheduler.update(output, [1, None])


def test_an_equal_beginning_is_not_computed_twice() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", range(1, 14), max_tokens=1))
    step(scheduler)
    scheduler.add(make_request("b", range(1, 14), max_tokens=1))
    output = scheduler.schedule()
    assert output.scheduled[0].request.num_cached_tokens == 12
    assert output.scheduled[0].num_tokens == 1


def test_a_prompt_that_is_being_computed_is_waited_for_and_shared() -> None:
    scheduler = make_scheduler(num_blocks=64, max_num_batched_tokens=16)
    for name in ("a", "b", "c"):  # as the choices of one request are
        scheduler.add(make_request(name, range(1, 39), max_tokens=2))
    scheduler.add(make_request("other", [7, 8], max_tokens=2))
    assert [e.request.request_id for e in scheduler.schedule().scheduled] == ["a"]
    for request in list(scheduler.running):
        scheduler.remove(request)
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.num_prefix_hits == 36
    assert scheduler.num_scheduled_tokens < 2 * 39


def test_one_that_waits_for_a_prompt_holds_nobody_up() -> None:
    scheduler = make_scheduler(num_blocks=64, max_num_batched_tokens=20)
    scheduler.add(make_request("a", range(1, 19)))
    scheduler.add(make_request("b", range(1, 19)))
    scheduler.add(make_request("other", [7, 8]))
    assert [e.request.request_id for e in scheduler.schedule().scheduled] == ["a", "other"]


def test_tenants_with_different_salts_share_nothing() -> None:
    scheduler = make_scheduler()
    for salt in ("x", "y"):
        scheduler.add(Request(salt, range(1, 14), SamplingParams(max_tokens=1), cache_salt=salt))
        step(scheduler)
    assert scheduler.num_prefix_hits == 0


def test_the_youngest_is_preempted_and_finishes_all_the_same() -> None:
    scheduler = make_scheduler(num_blocks=16)
    requests = [make_request(str(i), [i + 1] * 20, max_tokens=30) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.num_preemptions > 0
    assert requests[0].num_preemptions == 0
    assert [r.output_token_ids for r in requests] == [undisturbed(r) for r in requests]


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, aborts and steps in a cache that is too small for all of them."""

    @initialize(num_blocks=st.integers(16, 40), seqs=st.integers(1, 6), budget=st.integers(6, 40))
    def start(self, num_blocks: int, seqs: int, budget: int) -> None:
        self.scheduler = make_scheduler(num_blocks, max_num_seqs=seqs, max_num_batched_tokens=budget)
        self.live: dict[str, Request] = {}
        self.count = 0

    @rule(prompt=st.lists(st.integers(1, 3), min_size=1, max_size=50), max_tokens=st.integers(1, 40))
    def add(self, prompt: list[int], max_tokens: int) -> None:
        self.count += 1
        request = make_request(str(self.count), prompt, max_tokens)
        self.live[request.request_id] = request
        self.scheduler.add(request)

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.live:
            self.scheduler.remove(self.live.pop(data.draw(st.sampled_from(sorted(self.live)))))

    @rule(data=st.data())
    def hand_over(self, data: st.DataObject) -> None:
        """The request goes on elsewhere, and comes back with what was emitted."""
        if self.live:
            name = data.draw(st.sampled_from(sorted(self.live)))
            old = self.live.pop(name)
            self.scheduler.remove(old)
            prompt = old.token_ids[: old.num_prompt_tokens]
            self.live[name] = Request(name, prompt, old.params, output_token_ids=old.output_token_ids)
            self.scheduler.add(self.live[name])

    @rule(steps=st.integers(1, 12))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            if self.scheduler.has_work:
                for output in step(self.scheduler):
                    self.note(output)

    def note(self, output: StepOutput) -> None:
        request = self.live[output.request_id]
        assert request.token_ids[-1] == output.token_id
        if output.finish_reason is not None:
            assert request.output_token_ids == undisturbed(request)
            assert (output.finish_reason is FinishReason.STOP) == (output.token_id == EOS)
            del self.live[output.request_id]

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            for request in self.scheduler.running:
                assert 0 <= request.num_computed_tokens < request.num_tokens
            assert {r.request_id for r in (*self.scheduler.running, *self.scheduler.waiting)} == self.live.keys()

    def teardown(self) -> None:
        """Nobody starves, and everything returns to baseline."""
        if hasattr(self, "scheduler"):
            for _ in range(20_000):
                if not self.scheduler.has_work:
                    break
                for output in step(self.scheduler):
                    self.note(output)
            assert not self.live
            assert self.scheduler.block_pool.num_free == self.scheduler.block_pool.num_blocks


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
