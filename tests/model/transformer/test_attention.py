"""Paged attention, its windows, sinks and caches of integers: the values by definition, the bits by position alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.model.transformer.paged_request import BLOCK, PagedRequest, cpu_cache
from tokenrelay.model.transformer import kernels
from tokenrelay.model.transformer.kernels import native, reference, reference_attention
from tokenrelay.model.transformer.kernels.reference_attention import LARGEST_CACHED
from tokenrelay.model.transformer.kv_cache import LayerCache

CACHE_DTYPES = [torch.float32, torch.int16, torch.int8]
HEADS = [(2, 2), (9, 3), (8, 1)]
SEEN = [(0, 0), (5, 0), (40, 0), (40, 4), (20, 70)]  # window, sinks

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.why_unavailable() or "native library")


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def close(actual: Tensor, expected: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=atol)


def tensors(cache: LayerCache) -> list[Tensor]:
    return [tensor for tensor in cache if tensor is not None]


def index_of(tables: Tensor, query_lengths: list[int], lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    return tables.int(), torch.tensor([0, *query_lengths]).cumsum(0).int(), torch.tensor(lengths).int()


def check_against_the_reference(
    q: Tensor,
    cache: LayerCache,
    index: tuple[Tensor, Tensor, Tensor],
    window: int = 0,
    num_sinks: int = 0,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> None:
    for q_sink in (torch.randn_like(q), None):
        seen = window, num_sinks, q_sink, cache.key_scales, cache.value_scales, softcap, sink_logits
        arguments = (q, cache.keys, cache.values, *index, q.shape[2] ** -0.5, *seen)
        one_step = 2e-5 if cache.keys.is_floating_point() else 5e-4  # of 4096, which a last bit may tip over
        close(kernels.paged_attention(*arguments), reference.paged_attention(*arguments), one_step)


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("head_dim", [8, 16, 40, 64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_attention_equals_the_reference(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    query_lengths, lengths = [1, 20, 1, 33, 70], [1, 20, 150, 100, 77]
    cache = cpu_cache(40, kv_heads, head_dim, dtype)
    index = index_of(torch.stack([torch.randperm(40)[:10] for _ in lengths]), query_lengths, lengths)
    q = torch.randn(sum(query_lengths), heads, head_dim)
    for window, num_sinks in SEEN:
        check_against_the_reference(q, cache, index, window, num_sinks)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 112, 256])
def test_capped_scores_and_learned_sinks_equal_the_reference(head_dim: int, dtype: torch.dtype) -> None:
    query_lengths, lengths = [1, 20, 1, 40], [1, 20, 150, 77]
    cache = cpu_cache(40, 2, head_dim, dtype)
    index = index_of(torch.stack([torch.randperm(40)[:10] for _ in lengths]), query_lengths, lengths)
    q = torch.randn(sum(query_lengths), 6, head_dim) * 5
    sink_logits = torch.tensor([-20.0, -1.0, 0.0, 1.0, 5.0, 50.0])
    for window, num_sinks in ((0, 0), (21, 0), (40, 4)):
        for softcap, sinks in ((4.0, None), (0.0, sink_logits), (20.0, sink_logits)):
            check_against_the_reference(q, cache, index, window, num_sinks, softcap, sinks)


def test_scores_are_capped_then_masked_and_a_sink_takes_its_share() -> None:
    length, heads, softcap, sink_logits = 30, 4, 2.0, torch.tensor([-1.0, 0.0, 1.0, 3.0])
    request = PagedRequest(length, heads, heads, 24, torch.float32)
    request.softcap, request.sink_logits, request.cos_sin = softcap, sink_logits, None
    q, k, v = request.qkv.view(length, 3 * heads, 24).transpose(0, 1).chunk(3)
    scores = softcap * (q @ k.transpose(1, 2) * 24**-0.5 / softcap).tanh()
    powers = scores.exp().tril()
    shares = powers / (powers.sum(-1, keepdim=True) + sink_logits.exp().view(heads, 1, 1))
    close(request.forward(0, length), (shares @ v).transpose(0, 1).flatten(1))


def test_blocks_may_be_larger_than_sixteen() -> None:
    cache = cpu_cache(3, 2, 16, block_size=32)
    check_against_the_reference(torch.randn(5, 4, 16), cache, index_of(torch.tensor([[2, 0]]), [5], [50]), 20, 3)


def test_head_sizes_beyond_the_kernels_fall_back() -> None:
    for dtype in CACHE_DTYPES:
        cache = cpu_cache(2, 1, 272, dtype)
        check_against_the_reference(torch.randn(2, 1, 272), cache, index_of(torch.tensor([[1]]), [2], [9]), 4, 2)


def by_definition(request: PagedRequest, position: int) -> Tensor:
    """StreamingLLM, literally: the keys that a token sees are packed together, then rotated to their new places."""
    window, sinks = request.window, request.num_sinks
    everything = position < sinks + window
    visible = [*range(position + 1)] if everything else [*range(sinks), *range(position - window + 1, position + 1)]
    heads = request.qkv.view(len(request.qkv), -1, request.head_dim)[visible]
    q, k, v = torch.split(heads, [request.heads, request.kv_heads, request.kv_heads], dim=1)
    place = torch.arange(len(visible))
    q, k = (reference_attention.rotate(x, place[-len(x) :], request.cos_sin) for x in (q[-1:], k))
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).flatten()


@pytest.mark.parametrize(("window", "num_sinks"), SEEN[1:])
def test_a_token_sees_its_window_and_the_sinks(window: int, num_sinks: int) -> None:
    request = PagedRequest(180, 6, 2, 24, torch.float32, window, num_sinks)
    expected = torch.stack([by_definition(request, position) for position in range(180)])
    torch.testing.assert_close(request.forward(0, 180), expected, rtol=1e-4, atol=1e-4)


# --- bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize(("window", "num_sinks"), SEEN)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_a_prefill_row_has_the_bits_of_a_decode_step(
    heads: int, kv_heads: int, window: int, num_sinks: int, dtype: torch.dtype
) -> None:
    request = PagedRequest(150, heads, kv_heads, 24, dtype, window, num_sinks)
    whole = request.forward(0, 150)
    for chunk in (1, 7, 16, 64):
        assert torch.equal(request.forward_in_chunks(chunk), whole)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize(("window", "num_sinks"), SEEN[1:])
@pytest.mark.parametrize("chunk", [1, 33])
def test_capped_scores_and_learned_sinks_keep_the_bits(
    chunk: int, window: int, num_sinks: int, dtype: torch.dtype
) -> None:
    request = PagedRequest(200, 4, 2, 24, dtype, window, num_sinks)
    request.softcap, request.sink_logits = 1.5, torch.tensor([-9.0, 0.0, 2.0, float("-inf")])
    whole = request.forward(0, 200)
    assert torch.equal(request.forward_in_chunks(chunk), whole)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize(("window", "num_sinks"), SEEN[1:])
@pytest.mark.parametrize("chunk", [1, 33])
def test_a_block_below_the_window_may_be_anothers(chunk: int, window: int, num_sinks: int, dtype: torch.dtype) -> None:
    request = PagedRequest(200, 4, 2, 24, dtype, window, num_sinks)
    whole = request.forward(0, 200)
    assert torch.equal(request.forward_in_chunks(chunk, free=True), whole)
    assert (request.table == 0).sum() > 3, "blocks were freed"


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_a_window_changes_nothing_before_it_is_full(dtype: torch.dtype) -> None:
    request = PagedRequest(150, 9, 3, 64, dtype)
    whole = request.forward(0, 150)
    for window, num_sinks in [(150, 0), (146, 4), (80, 70), (100, 5)]:
        request.window, request.num_sinks = window, num_sinks
        assert torch.equal(request.forward(0, 150)[: window + num_sinks], whole[: window + num_sinks])


def test_attention_does_not_depend_on_the_other_requests() -> None:
    keys, values, key_scales, value_scales = cpu_cache(30, 3, 64, torch.int16)
    q, q_sink, tables = torch.randn(64, 9, 64), torch.randn(64, 9, 64), torch.stack([torch.randperm(30)[:20]] * 3)
    query_lengths, lengths = [3, 60, 1], [300, 80, 77]
    for window, num_sinks in SEEN:
        index = index_of(tables, query_lengths, lengths)
        together = kernels.paged_attention(
            q, keys, values, *index, 0.125, window, num_sinks, q_sink, key_scales, value_scales
        )
        for b, rows in enumerate([slice(0, 3), slice(3, 63), slice(63, 64)]):
            index = index_of(tables[b : b + 1], query_lengths[b : b + 1], lengths[b : b + 1])
            own = kernels.paged_attention(
                q[rows], keys, values, *index, 0.125, window, num_sinks, q_sink[rows], key_scales, value_scales
            )
            assert torch.equal(own, together[rows])


# --- integers -------------------------------------------------------------------------------------------------------

INTEGERS = [torch.int16, torch.int8]


def cached(key: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The elements and the scale of one key [D], written as integers."""
    keys, values, key_scales, value_scales = tensors(cpu_cache(1, 1, len(key), dtype))
    first, qkv = torch.zeros(1, dtype=torch.int64), torch.cat((key, key, key)).unsqueeze(0)
    kernels.rotate_and_cache(qkv, first, None, keys, values, first, 1, 1, key_scales, value_scales)
    elements = keys[0, 0, :, 0].flatten()
    assert torch.equal(elements, values[0, 0, 0, : len(key), 0])
    assert torch.equal(key_scales[0, 0, 0], value_scales[0, 0, 0]) or key.isnan().any()
    return elements, key_scales[0, 0, 0]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_elements_are_rounded_to_even_multiples_of_the_scale(dtype: torch.dtype) -> None:
    largest = LARGEST_CACHED[dtype]
    elements, scale = cached(torch.tensor([2.0 * largest, -2.0 * largest, 1.0, 3.0, 5.0, -1.0, -3.0, 0.0]), dtype)
    assert elements.tolist() == [largest, -largest, 0, 2, 2, 0, -2, 0]
    assert scale == 2


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-40, 1e-30, 3e38])
def test_integers_hold_any_magnitude(largest: float, dtype: torch.dtype) -> None:
    """Except that what is below 1e-34 is nothing."""
    elements, scale = cached(torch.tensor([largest, -largest]).repeat(4), dtype)
    assert elements[0] == -elements[1]
    assert (elements[0].double() * scale.double() - largest).abs() <= max(1e-34, largest / 100)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("unusable", [float("nan"), float("inf")])
def test_integers_do_not_hide_an_overflow(unusable: float, dtype: torch.dtype) -> None:
    assert not cached(torch.tensor([1.0, unusable, 2.0, 3.0]).repeat(2), dtype)[1].isfinite()


@pytest.mark.parametrize("dtype", INTEGERS)
def test_a_value_that_is_no_number_spoils_who_sees_it_and_nobody_else(dtype: torch.dtype) -> None:
    request = PagedRequest(100, 6, 2, 24, dtype)
    whole = request.forward(0, 100)
    head_begin = (6 + 2 + 1) * 24  # the value of the second head
    request.qkv[70, head_begin : head_begin + 24] = float("nan")
    spoiled = request.forward(0, 100).view(100, 2, 3, 24)
    assert torch.equal(spoiled[:70].flatten(1), whole[:70])
    assert torch.equal(spoiled[:, 0].flatten(1), whole.view(100, 2, 72)[:, 0])
    assert spoiled[70:, 1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, *INTEGERS])
def test_a_query_of_zeros_weighs_all_its_keys_alike(dtype: torch.dtype) -> None:
    request = PagedRequest(100, 6, 2, 24, dtype)
    request.qkv[:, : 6 * 24] = 0
    mean = request.qkv[:71, 8 * 24 :].mean(0).view(2, 1, 24).expand(2, 3, 24)
    close(request.forward(0, 100)[70], mean.flatten(), 0.01)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("head_dim", [8, 24, 33, 64])
def test_integers_are_written_as_the_reference_does(head_dim: int, dtype: torch.dtype) -> None:
    tokens, heads, kv_heads = 70, 6, 2
    qkv, positions = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim), torch.randint(0, 50, (tokens,))
    slots, cos_sin = torch.randperm(8 * BLOCK)[:tokens], torch.randn(50, head_dim // 2 * 2)
    slots[5] = -1
    cache = tensors(cpu_cache(8, kv_heads, head_dim, dtype))
    if head_dim % 2:
        cache[0][:, :, -1, :, 1] = 0  # beside the last element there is none
    expected = [tensor.clone() for tensor in cache]
    for operations, (keys, values, *scales) in ((kernels, cache), (reference, expected)):
        operations.rotate_and_cache(qkv, positions, cos_sin, keys, values, slots, heads, kv_heads, *scales)
    for written, correct in zip(cache[:2], expected[:2], strict=True):  # a fused multiply may tip a value over
        assert (written.int() - correct.int()).abs().max() <= 1
    close(torch.stack(cache[2:]), torch.stack(expected[2:]))


@pytest.mark.parametrize(("dtype", "error"), [(torch.int16, 0.0005), (torch.int8, 0.01)])
def test_attention_over_integers_is_near_that_over_floats(dtype: torch.dtype, error: float) -> None:
    wide, narrow = (PagedRequest(150, 9, 3, 64, of, 70, 4) for of in (torch.float32, dtype))
    narrow.qkv, narrow.table = wide.qkv, wide.table
    expected, difference = wide.forward(0, 150), narrow.forward(0, 150) - wide.forward(0, 150)
    assert 0 < difference.norm() <= error * expected.norm()
    keys, values, key_scales, value_scales = tensors(narrow.cache)
    for stored, scales, exact in (
        (keys.transpose(2, 3).flatten(3), key_scales, wide.cache.keys.transpose(2, 3)),
        (values.transpose(3, 4).flatten(2, 3), value_scales, wide.cache.values),
    ):
        written = wide.table[:9].long()  # the blocks that are full
        steps = (stored - exact / scales.unsqueeze(-1))[written].abs()
        assert 0.45 < steps.max() <= 0.5 + 1e-7 * LARGEST_CACHED[dtype] + 1e-5
