"""How many blocks a GPU gets, and what is run to find out."""

from __future__ import annotations

import pytest

from tokenrelay.model.config import EngineConfig
from tokenrelay.model.engine.device_memory import MemoryUsage, kv_cache_blocks
from tokenrelay.model.engine.profiling import largest_step

GIB = 1 << 30
MEMORY = MemoryUsage(total=24 * GIB, free=8 * GIB, activations=GIB)
BLOCK = 4 << 20


def test_weights_cache_and_a_step_fill_the_share_and_no_more() -> None:
    num_blocks = kv_cache_blocks(MEMORY, 0.9, BLOCK, with_graphs=False)
    taken = 16 * GIB + GIB + (num_blocks + 1) * BLOCK  # the cache has a spare block
    assert taken <= 0.9 * 24 * GIB < taken + BLOCK


def test_graphs_keep_a_step_s_memory_for_themselves() -> None:
    with_graphs, without = (kv_cache_blocks(MEMORY, 0.9, BLOCK, with_graphs=graphs) for graphs in (True, False))
    assert without - with_graphs == GIB // BLOCK


@pytest.mark.parametrize("memory", [MEMORY._replace(free=3 * GIB), MEMORY._replace(activations=6 * GIB)])
def test_where_nothing_is_left_the_error_says_what_to_change(memory: MemoryUsage) -> None:
    with pytest.raises(
        ValueError, match=r"gpu_memory_utilization 0\.9 leaves no room .* Raise it, lower max_num_batched"
    ):
        kv_cache_blocks(memory, 0.9, BLOCK, with_graphs=False)


@pytest.mark.parametrize(("budget", "num_seqs", "context"), [(256, 64, 1024), (100, 7, 1024), (512, 2, 48), (8, 8, 64)])
def test_the_profiled_step_is_as_large_as_the_scheduler_s_can_be(budget: int, num_seqs: int, context: int) -> None:
    config = EngineConfig(max_num_batched_tokens=budget, max_num_seqs=num_seqs)
    step = largest_step(config, context)
    assert len(step.scheduled) == num_seqs
    assert step.num_rows == min(budget, num_seqs * context)
    assert all(entry.samples and entry.num_rows <= context for entry in step.scheduled)
    for entry in step.scheduled:
        assert len(entry.request.block_table) * config.block_size >= entry.num_rows
