"""The scheduler alone, over a network that needs no tensors."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.model.engine.fake_network import EOS, FakeNetwork
from tokenrelay.model.config import EngineConfig
from tokenrelay.model.engine.block_tables import Window
from tokenrelay.model.engine.request import Request
from tokenrelay.model.engine.scheduler import Scheduler
from tokenrelay.model.engine.step import Sampled, StepOutput
from tokenrelay.model.sampling_params import SamplingParams

MAX_MODEL_LEN = 64
BLOCK_SIZE = 4


class Bench:
    """A scheduler and the network it schedules for."""

    def __init__(self, num_blocks: int = 16, *, window: Window | None = None, **config: int) -> None:
        settings = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "num_speculative_tokens": 0} | config
        engine_config = EngineConfig(block_size=BLOCK_SIZE, **settings)  # type: ignore[arg-type]
        self.scheduler = Scheduler(engine_config, num_blocks, MAX_MODEL_LEN, [EOS], window)
        self.network = FakeNetwork(BLOCK_SIZE, window)

    def add(self, name: str, prompt: Sequence[int], max_tokens: int = 8, priority: int = 0, salt: str = "") -> Request:
        params = SamplingParams(max_tokens=max_tokens)
        request = Request(name, prompt, params, priority=priority, cache_salt=salt)
        self.scheduler.add(request)
        return request

    def step(self) -> list[StepOutput]:
        output = self.scheduler.schedule()
        assert output.scheduled, "work without progress"
        results = self.scheduler.update(output, self.network.execute(output))
        self.scheduler.check_integrity()
        return results

    def run(self) -> None:
        while self.scheduler.has_work:
            self.step()

    def undisturbed(self, request: Request) -> list[int]:
        return self.network.undisturbed(request, MAX_MODEL_LEN)


def names(output: object) -> list[str]:
    return [entry.request.request_id for entry in output.scheduled]  # type: ignore[attr-defined]


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    bench = Bench(max_num_batched_tokens=16)
    bench.add("a", range(1, 41))
    chunks = []
    while not any(bench.step()):
        chunks.append(bench.scheduler.running[0].num_computed_tokens)
    assert chunks == [16, 32]


def test_a_running_request_gets_its_token_beside_a_long_prompt() -> None:
    bench = Bench(num_blocks=32, max_num_batched_tokens=8)
    bench.add("short", [1, 2])
    bench.step()
    bench.add("long", range(1, 41))
    for _ in range(3):
        output = bench.scheduler.schedule()
        assert [(e.request.request_id, e.num_tokens) for e in output.scheduled] == [("short", 1), ("long", 7)]
        bench.scheduler.update(output, [Sampled((1,)), Sampled()])


def test_a_prompt_beside_running_streams_comes_in_smaller_chunks() -> None:
    bench = Bench(num_blocks=32, max_prefill_tokens_beside_decodes=3)
    bench.add("short", [1, 2])
    bench.step()
    bench.add("long", range(1, 41))
    output = bench.scheduler.schedule()
    assert [(e.request.request_id, e.num_tokens) for e in output.scheduled] == [("short", 1), ("long", 3)]


def test_an_equal_prompt_costs_its_last_token() -> None:
    bench = Bench()
    bench.add("a", range(1, 15), max_tokens=1)
    bench.step()
    bench.add("b", range(1, 15), max_tokens=1)
    output = bench.scheduler.schedule()
    assert output.scheduled[0].request.num_cached_tokens == 13
    assert output.scheduled[0].num_tokens == 1
    assert len(output.block_copies) == 1  # three full blocks are shared, the beginning of the fourth is copied


def test_the_choices_of_a_request_compute_their_prompt_once() -> None:
    bench = Bench(num_blocks=64, max_num_batched_tokens=16)
    choices = [bench.add(name, range(1, 39), max_tokens=2) for name in ("a", "b", "c")]
    bench.add("other", [7, 8], max_tokens=2)
    assert names(bench.scheduler.schedule()) == ["a"]
    bench.scheduler.remove(choices[0])
    bench.run()
    assert bench.scheduler.num_prefix_hits == 37
    assert bench.scheduler.num_scheduled_tokens <= 38 + 2 + 2 + 2 + 1  # one prompt, and what was sampled from
    assert [r.output_token_ids for r in choices[1:]] == [bench.undisturbed(r) for r in choices[1:]]


def test_the_next_turn_of_a_conversation_continues_in_the_middle_of_a_block() -> None:
    bench = Bench(num_blocks=32)
    first = bench.add("first", range(1, 15), max_tokens=4)
    bench.run()
    bench.add("next", [*first.token_ids, 5, 6, 7], max_tokens=1)
    assert bench.scheduler.schedule().scheduled[0].request.num_cached_tokens == first.num_tokens - 1


def test_one_that_waits_for_a_prompt_holds_nobody_up() -> None:
    bench = Bench(num_blocks=64, max_num_batched_tokens=20)
    for name in ("a", "b"):
        bench.add(name, range(1, 19))
    bench.add("other", [7, 8])
    assert names(bench.scheduler.schedule()) == ["a", "other"]


def test_tenants_with_different_salts_share_nothing() -> None:
    bench = Bench()
    for salt in ("x", "y"):
        bench.add(salt, range(1, 14), max_tokens=1, salt=salt)
        bench.step()
    assert bench.scheduler.num_prefix_hits == 0


def test_the_last_in_order_is_preempted_and_finishes_all_the_same() -> None:
    bench = Bench(num_blocks=16)
    requests = [bench.add(str(i), [i + 1] * 20, max_tokens=30) for i in range(3)]
    bench.run()
    assert bench.scheduler.num_preemptions > 0
    assert requests[0].num_preemptions == 0
    assert [r.output_token_ids for r in requests] == [bench.undisturbed(r) for r in requests]


def test_a_lower_priority_class_comes_first() -> None:
    bench = Bench(num_blocks=32)
    for name, priority in (("batch", 5), ("normal", 0), ("urgent", -5)):
        bench.add(name, [10 + priority] * 29, priority=priority)
    bench.step()
    assert [r.request_id for r in bench.scheduler.running] == ["urgent"]
    bench.add("late but urgent", [9, 9, 9], priority=-5)
    assert [r.request_id for r in bench.scheduler.waiting] == ["late but urgent", "normal", "batch"]


def test_a_higher_priority_class_is_evicted_last() -> None:
    bench = Bench(num_blocks=16)
    low = bench.add("low", [1] * 20, max_tokens=40, priority=1)
    bench.step()
    high = [bench.add(f"high {i}", [2 + i] * 20, max_tokens=40) for i in range(2)]
    bench.run()
    assert low.num_preemptions > 0
    assert high[0].num_preemptions == 0


def test_right_drafts_come_out_together_and_change_nothing() -> None:
    bench = Bench(num_blocks=64, num_speculative_tokens=4)
    bench.network = FakeNetwork(BLOCK_SIZE, vocab_size=2)
    bench.network.next_token = lambda token_ids: 1 + len(token_ids) % 3  # type: ignore[method-assign]
    request = bench.add("a", [1, 2, 3, 1, 2, 3, 1], max_tokens=30)
    steps = 0
    while bench.scheduler.has_work:
        bench.step()
        steps += 1
    assert request.output_token_ids == bench.undisturbed(request)
    assert steps < 12
    assert bench.scheduler.num_accepted_tokens == bench.scheduler.num_draft_tokens == 30 - steps


@pytest.mark.parametrize("window", [Window(8), Window(8, 3)])
def test_what_falls_out_of_the_window_is_given_back(window: Window) -> None:
    bench = Bench(num_blocks=16, window=window)
    request = bench.add("a", range(1, 41), max_tokens=20)
    most = 0
    while bench.scheduler.has_work:
        bench.step()
        most = max(most, sum(block >= 0 for block in request.block_table))
    assert most <= (8 + 16) // BLOCK_SIZE + 2
    assert request.output_token_ids == bench.undisturbed(request)


def test_drafts_take_nothing_from_a_prompt() -> None:
    bench = Bench(num_blocks=64, num_speculative_tokens=8, max_prefill_tokens_beside_decodes=6)
    bench.network.next_token = lambda token_ids: 1 + len(token_ids) % 3  # type: ignore[method-assign]
    for name in ("a", "b"):
        bench.add(name, [1, 2, 3, 1, 2, 3, 1], max_tokens=50, salt=name)
    bench.step()
    bench.add("long", range(4, 44))
    for _ in range(3):
        output = bench.scheduler.schedule()
        assert [(e.num_tokens, len(e.draft_token_ids)) for e in output.scheduled] == [(1, 0), (1, 0), (6, 0)]
        bench.scheduler.update(output, bench.network.execute(output))
