"""What CUDA computes, on a CPU: the fallback itself, and what FlashAttention is asked, by a stand-in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest

from tokenrelay.model.transformer.kernels import cuda, gathered, reference
from tokenrelay.model.transformer.kv_cache import LayerCache

H, KV, D = 6, 2, 16
QUERY_LENS, SEQ_LENS = [1, 20, 3], [70, 20, 41]
SEEN = [(0, 0.0, False), (9, 0.0, False), (0, 4.0, False), (0, 0.0, True), (9, 4.0, True)]  # window, cap, sink logits

Caches = tuple[LayerCache, LayerCache]
Index = tuple[Tensor, Tensor, Tensor]


def index_of(block_size: int) -> Index:
    """Three requests, whose blocks lie out of order in a pool of just enough."""
    counts = [-(-length // block_size) for length in SEQ_LENS]
    tables = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    order = torch.randperm(sum(counts)).int()
    for row, count, end in zip(tables, counts, torch.tensor(counts).cumsum(0).tolist(), strict=True):
        row[:count] = order[end - count : end]
    return tables, torch.tensor([0, *QUERY_LENS]).cumsum(0).int(), torch.tensor(SEQ_LENS).int()


def equal_caches(num_blocks: int, block_size: int) -> Caches:
    """The same random keys and values as the CPU and as CUDA lay them out."""
    gpu = LayerCache(
        *(torch.randn(shape) for shape in cuda.kv_cache_shapes(num_blocks, block_size, KV, D, torch.float32))
    )
    cpu = LayerCache(gpu.keys[:-1].permute(0, 2, 3, 1).contiguous(), gpu.values[:-1].permute(0, 2, 1, 3).contiguous())
    return cpu, gpu


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: AuxRequest,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    """torch's, by its documentation and by what its C++ demands. The keys' starts are garbage: they are not read."""
    assert cu_seq_k is not None, "both or none"
    assert (key.shape[1] % 256, return_aux.lse, enable_gqa, num_splits) == (0, True, True, 1)
    left, right = window_size
    assert right == 0
    starts, out, logsumexp = cu_seq_q.tolist(), torch.empty_like(query), query.new_empty(query.shape[1], len(query))
    for i, length in enumerate(seqused_k.tolist()):
        rows = slice(starts[i], starts[i + 1])
        assert rows.stop - rows.start <= max_q
        assert length <= max_k
        k, v = (x[block_table[i]].flatten(0, 1)[:length].repeat_interleave(H // KV, 1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[rows], k) * scale
        place, at = torch.arange(length), torch.arange(length - (rows.stop - rows.start), length).unsqueeze(1)
        scores = scores.masked_fill((place > at) | ((place < at - left) & (left >= 0)), -torch.inf)
        out[rows], logsumexp[:, rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1)
    return out, logsumexp


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("window", "softcap", "sinks"), SEEN)
@pytest.mark.parametrize("block_size", [16, 256])
def test_the_fallback_equals_the_reference(block_size: int, window: int, softcap: float, sinks: bool) -> None:
    index = index_of(block_size)
    cpu, gpu = equal_caches(int(index[0].max()) + 1, block_size)
    q, sink_logits = torch.randn(sum(QUERY_LENS), H, D), torch.randn(H) if sinks else None
    actual, expected = (
        device.paged_attention(
            q, layer.keys, layer.values, *index, 0.3, window, softcap=softcap, sink_logits=sink_logits
        )
        for device, layer in ((gathered, gpu), (reference, cpu))
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_row_of_the_fallback_does_not_depend_on_the_longest_request_and_reads_no_block_that_it_does_not_see() -> None:
    tables, starts, lens = index_of(16)
    _, gpu = equal_caches(int(tables.max()) + 1, 16)
    q = torch.randn(sum(QUERY_LENS), H, D)
    among = gathered.paged_attention(q, gpu.keys, gpu.values, tables, starts, lens, 0.3, window=9)
    alone = gpu.keys[tables[1, 0]].clone(), gpu.values[tables[1, 0]].clone()
    for tensor, kept in zip((gpu.keys, gpu.values), alone, strict=True):
        tensor.fill_(torch.nan)
        tensor[0] = kept  # its first block; the second is not seen by its last token
    lone = gathered.paged_attention(
        q[1:2],
        gpu.keys,
        gpu.values,
        torch.tensor([[0, 1]]).int(),
        torch.tensor([0, 1]).int(),
        torch.tensor([1]).int(),
        0.3,
    )
    torch.testing.assert_close(lone, among[1:2])
    assert lone.isfinite().all()


@pytest.mark.parametrize(("window", "softcap", "sinks"), SEEN)
def test_flash_attention_is_asked_for_what_the_reference_computes(
    monkeypatch: pytest.MonkeyPatch, window: int, softcap: float, sinks: bool
) -> None:
    monkeypatch.setattr(cuda, "varlen_attn", varlen_attn)
    monkeypatch.setattr(cuda, "_flash_takes", lambda *_: True)  # fp32, so that the comparison is sharp
    index = index_of(cuda.BLOCK_SIZE)
    cpu, gpu = equal_caches(int(index[0].max()) + 1, cuda.BLOCK_SIZE)
    q, sink_logits = torch.randn(sum(QUERY_LENS), H, D), torch.randn(H) if sinks else None
    actual, expected = (
        device.paged_attention(
            q, layer.keys, layer.values, *index, 0.3, window, softcap=softcap, sink_logits=sink_logits
        )
        for device, layer in ((cuda, gpu), (reference, cpu))
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "block_size", "takes"),
    [
        (torch.bfloat16, 80, 256, True),
        (torch.float16, 256, 512, True),
        (torch.float32, 64, 256, False),
        (torch.bfloat16, 20, 256, False),
        (torch.bfloat16, 512, 256, False),
        (torch.bfloat16, 64, 16, False),
    ],
)
def test_what_flash_attention_refuses_falls_back(
    dtype: torch.dtype, head_dim: int, block_size: int, takes: bool
) -> None:
    q = torch.empty(1, 2, head_dim, dtype=dtype)
    assert cuda._flash_takes(q, torch.empty(1, block_size, 2, head_dim, dtype=dtype)) is takes


def test_what_is_written_to_a_negative_slot_goes_to_the_spare_block() -> None:
    _, gpu = equal_caches(2, 16)
    before = [tensor.clone() for tensor in (gpu.keys, gpu.values)]
    qkv, slots = torch.randn(3, (H + 2 * KV) * D), torch.tensor([5, -1, 17])
    q = cuda.rotate_and_cache(qkv, torch.arange(3), None, gpu.keys, gpu.values, slots, H, KV)
    k, v = qkv.view(3, -1, D)[:, H : H + KV], qkv.view(3, -1, D)[:, H + KV :]
    assert torch.equal(q, qkv.view(3, -1, D)[:, :H])
    for tensor, was, new in zip((gpu.keys, gpu.values), before, (k, v), strict=True):
        was[0, 5], was[1, 1] = new[0], new[2]
        assert torch.equal(tensor[:-1], was[:-1])


def test_what_the_gpu_cannot_do_is_refused_by_name() -> None:
    x = torch.empty(0)
    with pytest.raises(ValueError, match="attention sinks are not supported on CUDA"):
        cuda.paged_attention(x, x, x, x, x, x, 0.125, window=20, num_sinks=4)
    with pytest.raises(ValueError, match="int8 KV cache is not supported on CUDA"):
        cuda.paged_attention(x, x, x, x, x, x, 0.125, key_scales=x)
