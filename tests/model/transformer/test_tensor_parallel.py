"""What each rank holds of a network: together all of it, nothing twice, and no more than its share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.quantized import Quantized, quantize
from tokenrelay.model.transformer.tensor_parallel import Share

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=64,
    hidden_size=96,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    norm="rms",
    norm_eps=1e-5,
    activation="silu",
    gated_mlp=True,
    positions="rotary",
)
Q, KV = 64, 32  # rows


def parts(target: str, tensor: Tensor | Quantized, shard: str = "", size: int = 2) -> list[Tensor]:
    """Of all ranks."""
    found = [Share(CONFIG, rank, size).part(f"layers.1.{target}", shard, tensor) for rank in range(size)]
    return [part.dequantized() if isinstance(part, Quantized) else part for part in found if part is not None]


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_a_rank_has_the_rows_of_its_heads_and_neurons(kind: str) -> None:
    rows = torch.arange(2 * Q + 2 * KV).float()
    matrix = rows.view(-1, 1).expand(-1, 96) if kind == "weight" else rows

    def first(found: list[Tensor]) -> list[list[float]]:
        return [(part[:, 0] if kind == "weight" else part).tolist() for part in found]

    whole = parts(f"attention.qkv_proj.{kind}", matrix[: Q + 2 * KV])
    assert first(whole)[1] == [*range(32, 64), *range(64 + 16, 96), *range(96 + 16, 128)]
    by_shard = [parts(f"attention.qkv_proj.{kind}", matrix[:length], shard) for shard, length in (("q", Q), ("k", KV))]
    assert [first(found)[1] for found in by_shard] == [[*range(32, 64)], [*range(16, 32)]]
    assert first(parts(f"mlp.up_proj.{kind}", matrix[:128]))[1] == [*range(32, 64), *range(96, 128)]
    assert first(parts(f"mlp.up_proj.{kind}", matrix[:64], "gate"))[1] == [*range(32, 64)]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("size", [2, 4])  # a share of 16 columns cuts through the groups of a quantized matrix
def test_the_parts_of_a_sum_add_up(size: int, quantized: bool) -> None:
    x, weight, bias = torch.randn(5, Q), torch.randn(96, Q), torch.randn(96)
    stored = quantize(weight) if quantized else weight
    weights, biases = (
        parts("attention.o_proj.weight", stored, size=size),
        parts("attention.o_proj.bias", bias, "", size),
    )
    inputs = x.chunk(size, dim=1)
    found = sum(i @ w.T + b for i, w, b in zip(inputs, weights, biases, strict=True))
    exact = stored.dequantized() if isinstance(stored, Quantized) else weight
    torch.testing.assert_close(found, x @ exact.T + bias)


def test_ranks_that_outnumber_the_key_heads_have_the_one_of_their_queries() -> None:
    keys = torch.arange(KV).float()
    assert [part[0].item() for part in parts("attention.qkv_proj.bias", keys, "k", size=4)] == [0, 0, 16, 16]


def test_only_the_leader_has_the_head_and_all_have_what_is_needed_whole() -> None:
    matrix = torch.randn(64, 96)
    assert [Share(CONFIG, rank, 2).part("lm_head.weight", "", matrix) is None for rank in (0, 1)] == [False, True]
    for target in ("embed_tokens.weight", "layers.0.mlp_norm.weight", "layers.0.mlp.router.weight"):
        assert all(Share(CONFIG, rank, 2).part(target, "", matrix) is matrix for rank in (0, 1))


def test_stacked_experts_are_cut_within_each() -> None:
    stack = torch.randn(3, 128, 96)
    found = parts("mlp.experts.{expert}.up_proj.weight", stack)
    assert torch.equal(found[1], torch.cat((stack[:, 32:64], stack[:, 96:]), 1))


def test_what_cannot_be_divided_is_refused_with_what_can() -> None:
    with pytest.raises(ValueError, match=r"size 3 is not possible with 4 attention heads; set it to 1 or 2 or 4"):
        Share(CONFIG, 0, 3)
    with pytest.raises(ValueError, match=r"6 key and value heads; set it to 1 or 2 or 3 or 6 or 12"):
        Share(replace(CONFIG, num_heads=12, num_kv_heads=6, intermediate_size=144), 0, 4)
    with pytest.raises(ValueError, match=r"99 neurons of an MLP; set it to 1"):
        Share(replace(CONFIG, intermediate_size=99), 0, 2)
    with pytest.raises(ValueError, match="a norm over all heads; set it to 1"):
        Share(replace(CONFIG, qk_norm="whole"), 0, 2)
