"""The cache's memory: what a block costs, and copying blocks."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from tests.model.transformer.paged_request import BLOCK, cpu_cache
from tests.model.transformer.test_fake_cuda import LLAMA
from tokenrelay.model.transformer.kv_cache import allocate_kv_cache, bytes_per_block, cache_dtype, copy_blocks

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.int16, torch.int8]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_costs_what_it_is_said_to(dtype: torch.dtype) -> None:
    cache = allocate_kv_cache(LLAMA, 5, BLOCK, dtype, CPU)
    allocated = sum(tensor.nbytes for layer in cache for tensor in layer if tensor is not None)
    assert allocated == 5 * bytes_per_block(LLAMA, BLOCK, dtype)


@pytest.mark.parametrize(
    ("choice", "dtype", "device", "expected"),
    [
        ("auto", torch.bfloat16, "cpu", torch.int16),
        ("auto", torch.float32, "cpu", torch.float32),
        ("auto", torch.bfloat16, "cuda", torch.bfloat16),
        ("int8", torch.bfloat16, "cpu", torch.int8),
    ],
)
def test_what_keys_and_values_are_kept_as(
    choice: Literal["auto", "int8"], dtype: torch.dtype, device: str, expected: torch.dtype
) -> None:
    assert cache_dtype(choice, dtype, torch.device(device)) is expected


def test_int8_is_refused_on_a_gpu() -> None:
    with pytest.raises(ValueError, match="kv_cache_dtype int8 is not supported on cuda"):
        allocate_kv_cache(LLAMA, 5, BLOCK, torch.int8, torch.device("cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_copied_blocks_hold_what_their_sources_held(dtype: torch.dtype) -> None:
    """All sources are read first: blocks may change places."""
    cache = [cpu_cache(6, 2, 8, dtype) for _ in range(2)]
    before = [[None if tensor is None else tensor.clone() for tensor in layer] for layer in cache]
    copy_blocks(cache, [(1, 4), (2, 3), (3, 2)])
    for layer, old in zip(cache, before, strict=True):
        for tensor, was in zip(layer, old, strict=True):
            assert (tensor is None) == (was is None) == (dtype is torch.float32 and tensor is None)
            if tensor is not None and was is not None:
                assert torch.equal(tensor, was[[0, 1, 3, 2, 1, 5]])
