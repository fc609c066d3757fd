"""Everything that may happen to requests, in any order, in a cache that is too small for all of them."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.model.engine.fake_network import EOS, FakeNetwork
from tokenrelay.model.config import EngineConfig
from tokenrelay.model.engine.block_tables import Window
from tokenrelay.model.engine.request import Request
from tokenrelay.model.engine.scheduler import Scheduler
from tokenrelay.model.engine.step import StepOutput
from tokenrelay.model.sampling_params import FinishReason, SamplingParams

BLOCK_SIZE = 4
MAX_MODEL_LEN = 64
WINDOWS = (Window(), Window(), Window(6), Window(16), Window(12, 3), Window(20, 5))

prompts = st.lists(st.integers(1, 3), min_size=1, max_size=50)  # few tokens: beginnings and n-grams repeat


class SchedulerMachine(RuleBasedStateMachine):
    """Arrivals, forks, aborts, hand-overs and steps; drafts, prefix hits and preemptions come by themselves."""

    steps = 0

    @initialize(
        num_blocks=st.integers(16, 40),
        max_num_seqs=st.integers(1, 6),
        budget=st.integers(6, 40),
        beside_decodes=st.integers(1, 12),
        drafts=st.sampled_from([0, 1, 4, 8]),
        window=st.sampled_from(WINDOWS),
        vocab_size=st.sampled_from([2, 3, 50]),  # with two tokens drafts are often right, and requests end soon
        caching=st.booleans(),
    )
    def start(
        self,
        num_blocks: int,
        max_num_seqs: int,
        budget: int,
        beside_decodes: int,
        drafts: int,
        window: Window,
        vocab_size: int,
        caching: bool,
    ) -> None:
        config = EngineConfig(
            block_size=BLOCK_SIZE,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_prefill_tokens_beside_decodes=beside_decodes,
            num_speculative_tokens=drafts,
            enable_prefix_caching=caching,
        )
        self.scheduler = Scheduler(config, num_blocks, MAX_MODEL_LEN, [EOS], window)
        self.network = FakeNetwork(BLOCK_SIZE, window, vocab_size)
        self.live: dict[str, Request] = {}
        self.count = 0

    def put(self, request: Request) -> None:
        self.live[request.request_id] = request
        self.scheduler.add(request)

    def draw_live(self, data: st.DataObject) -> Request:
        return self.live[data.draw(st.sampled_from(sorted(self.live)))]

    @rule(
        prompt=prompts,
        max_tokens=st.integers(1, 40),
        choices=st.integers(1, 4),
        priority=st.integers(-1, 1),
        salt=st.sampled_from(["", "other"]),
        scored=st.booleans(),
    )
    def add(self, prompt: list[int], max_tokens: int, choices: int, priority: int, salt: str, scored: bool) -> None:
        """One request, or several choices that fork from its prompt."""
        params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=0 if scored else None)
        for _ in range(choices):
            self.count += 1
            self.put(Request(f"{self.count:05}", prompt, params, priority=priority, cache_salt=salt))

    @rule(data=st.data(), more=prompts, keep=st.floats(0, 1))
    def follow_up(self, data: st.DataObject, more: list[int], keep: float) -> None:
        """A prompt that begins as a live sequence does: a conversation's next turn, or a branch of it."""
        if self.live:
            old = self.draw_live(data)
            prompt = [*old.token_ids[: int(keep * old.num_tokens)], *more][: MAX_MODEL_LEN - 1]
            self.count += 1
            self.put(Request(f"{self.count:05}", prompt, old.params))

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.live:
            self.scheduler.remove(self.live.pop(self.draw_live(data).request_id))

    @rule(data=st.data())
    def hand_over(self, data: st.DataObject) -> None:
        """The request goes on elsewhere, and comes back with what was emitted."""
        if self.live:
            old = self.draw_live(data)
            self.scheduler.remove(old)
            prompt = old.token_ids[: old.num_prompt_tokens]
            self.put(Request(old.request_id, prompt, old.params, output_token_ids=old.output_token_ids))

    @rule(steps=st.integers(1, 12))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            if self.scheduler.has_work:
                self.step()

    def step(self) -> None:
        SchedulerMachine.steps += 1
        output = self.scheduler.schedule()
        assert output.scheduled, "work without progress"
        assert len({entry.request.request_id for entry in output.scheduled}) == len(output.scheduled)
        for result in self.scheduler.update(output, self.network.execute(output)):
            self.note(result)
        self.books_balance()

    def note(self, output: StepOutput) -> None:
        request = self.live[output.request_id]
        assert tuple(request.token_ids[-len(output.token_ids) :]) == output.token_ids
        if output.finish_reason is not None:
            assert request.output_token_ids == self.network.undisturbed(request, MAX_MODEL_LEN)
            assert (output.finish_reason is FinishReason.STOP) == (output.token_ids[-1] == EOS)
            del self.live[output.request_id]

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            for request in self.scheduler.running:
                assert 0 <= request.num_computed_tokens < request.num_tokens
            for queue in (self.scheduler.running, self.scheduler.waiting):
                assert [r.order for r in queue] == sorted(r.order for r in queue)
            assert {r.request_id for r in (*self.scheduler.running, *self.scheduler.waiting)} == self.live.keys()

    def teardown(self) -> None:
        """Nobody starves, and everything returns to baseline."""
        if hasattr(self, "scheduler"):
            for _ in range(20_000):
                if not self.scheduler.has_work:
                    break
                self.step()
            assert not self.live
            assert self.scheduler.block_pool.num_free == self.scheduler.block_pool.num_blocks


def machine_settings(examples: int) -> settings:
    return settings(
        max_examples=examples, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
    )


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = machine_settings(60)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_steps() -> None:
    SchedulerMachine.steps = 0
    while SchedulerMachine.steps < 100_000:
        run_state_machine_as_test(SchedulerMachine, settings=machine_settings(500))
