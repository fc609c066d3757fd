"""The pool's books balance, whatever is asked of it."""

from __future__ import annotations

import pytest

from tokenrelay.model.engine.block_pool import BlockPool, BlockPoolError


def test_a_freed_block_is_found_again_until_it_is_reused() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1) or []
    pool.remember(block, b"prefix")
    pool.release([block])
    assert pool.lookup([b"prefix"]) == [block]
    pool.allocate(2)
    assert pool.lookup([b"prefix"]) == []


def test_blocks_without_a_known_prefix_are_reused_first() -> None:
    pool = BlockPool(3)
    known, unknown = pool.allocate(2) or []
    pool.remember(known, b"prefix")
    pool.release([known])
    pool.release([unknown])
    assert pool.allocate(1) == [unknown]


def test_the_end_of_a_sequence_is_evicted_before_its_beginning() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2) or []
    pool.remember(first, b"1")
    pool.remember(second, b"2")
    pool.release([first, second])
    assert pool.allocate(1) == [second]


def test_a_shared_block_is_free_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1) or []
    pool.acquire(blocks)
    pool.release(blocks)
    assert pool.num_free == 0
    pool.release(blocks)
    assert pool.num_free == 1


def test_nothing_is_allocated_when_not_everything_can_be() -> None:
    pool = BlockPool(2)
    assert pool.allocate(3) is None
    assert pool.num_free == 2


def test_a_lost_reference_is_reported_with_the_arithmetic() -> None:
    pool = BlockPool(2)
    table = pool.allocate(1) or []
    pool.check_integrity([table])
    with pytest.raises(BlockPoolError, match=r"\(0, 0, 1\)"):
        pool.check_integrity([])
