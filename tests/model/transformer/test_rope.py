"""Rotary tables equal transformers' for every kind of scaling, and go on beyond their end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families import read_hf_config
from tokenrelay.model.transformer.rope import rotary_rows, rotary_table

HEAD_DIM = 128
SHORT, LONG = [1.0 + i / 64 for i in range(64)], [1.0 + i / 2 for i in range(64)]
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 1024}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": SHORT,
    "long_factor": LONG,
    "original_max_position_embeddings": 1024,
}

SCALINGS: dict[str, dict[str, Any]] = {
    "linear (Vicuna 16k)": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn (Qwen 2.5)": YARN,
    "yarn, betas": YARN | {"beta_fast": 16, "beta_slow": 2},
    "yarn, mscale (DeepSeek)": YARN | {"mscale": 1.0, "mscale_all_dim": 0.8},
    "yarn, equal mscales": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "yarn, attention_factor": YARN | {"attention_factor": 1.3},
    "yarn, not truncated (gpt-oss)": YARN | {"truncate": False},
    "llama3 (Llama 3.1)": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "longrope (Phi-3)": LONGROPE,
    "longrope, factor": LONGROPE | {"factor": 8.0},
    "longrope, attention_factor": LONGROPE | {"attention_factor": 1.1},
}


def llama(rope: dict[str, Any] | None) -> LlamaConfig:
    size = {"hidden_size": 256, "num_attention_heads": 2, "vocab_size": 8, "intermediate_size": 8}
    return LlamaConfig(**size, max_position_embeddings=4096, rope_parameters=rope and dict(rope))


def ours(theirs: LlamaConfig) -> ModelConfig:
    return read_hf_config(theirs.to_dict())


def expected_table(config: LlamaConfig, max_len: int) -> Tensor:
    rope_type = config.rope_parameters["rope_type"]
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=max_len)
    angles = torch.arange(max_len).float()[:, None] * frequencies
    return torch.cat([angles.cos() * attention_factor, angles.sin() * attention_factor], dim=1)


@pytest.mark.parametrize("max_len", [1000, 1025, 20_000], ids=lambda n: f"max_len {n}")
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_the_table_is_transformers_for_a_sequence_of_max_len(scaling: dict[str, Any], max_len: int) -> None:
    theirs = llama(scaling)
    found = rotary_table(ours(theirs), max_len)
    assert (found.shape, found.dtype) == ((max_len, HEAD_DIM), torch.float32)
    torch.testing.assert_close(found, expected_table(theirs, max_len), rtol=0, atol=1e-6)


def test_without_scaling_the_table_is_the_paper_s() -> None:
    table = rotary_table(ours(llama(None)), 100)
    angle = torch.tensor(99 / 10_000 ** (6 / HEAD_DIM), dtype=torch.float64)
    assert table[99, 3].item() == pytest.approx(angle.cos().item(), abs=1e-5)
    assert table[99, 64 + 3].item() == pytest.approx(angle.sin().item(), abs=1e-5)


def test_scalings_differ_from_each_other_and_from_none() -> None:
    tables = [rotary_table(ours(llama(scaling)), 5000)[4990:] for scaling in (None, *SCALINGS.values())]
    for index, table in enumerate(tables):
        assert all((table - other).abs().max() > 1e-3 for other in tables[:index])


def test_longrope_is_long_or_short_for_the_whole_server() -> None:
    """Not by the length a sequence has at the moment: keys computed before would be turned by other frequencies."""
    config = ours(llama(LONGROPE))
    short, long = rotary_table(config, 1024), rotary_table(config, 1025)
    assert (short - long[:1024]).abs().max() > 0.1
    assert torch.equal(long, rotary_table(config, 4096)[:1025])


@pytest.fixture(params=[None, *SCALINGS.values()], ids=["none", *SCALINGS])
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return ours(llama(request.param))


def test_rows_inside_the_table_are_the_table_s(config: ModelConfig) -> None:
    table = rotary_table(config, 1500)
    positions = torch.tensor([0, 7, 1499, 7])
    assert torch.equal(rotary_rows(config, positions, table), table[positions])


def test_rows_beyond_the_table_are_exact(config: ModelConfig) -> None:
    """To one rounding, at positions where an fp32 angle would be off by radians."""
    table = rotary_table(config, 1500)
    positions = torch.tensor([1500, 2**20 + 1, 2**30 + 3])
    scale = table[0, 0].double()  # cos 0, times the attention factor
    frequencies = torch.atan2(table[1, 64:], table[1, :64]).double()  # of position 1, to an ulp
    found = rotary_rows(config, positions, table)
    turned = complex_(found / scale)
    assert (turned.abs() - 1).abs().max() <= 2e-7
    near = complex_(rotary_rows(config, positions + 5, table) / scale)
    five = torch.polar(torch.ones(64, dtype=torch.float64), 5 * frequencies)
    assert (near / turned - five).abs().max() <= 2e-6  # five positions are the same turn anywhere


def complex_(rows: Tensor) -> Tensor:
    return torch.complex(rows[:, : HEAD_DIM // 2], rows[:, HEAD_DIM // 2 :])


def test_the_end_of_the_table_is_no_seam(config: ModelConfig) -> None:
    """The formula is the same on both sides; only the angle's rounding differs, by half an ulp of the position."""
    shorter, longer = rotary_table(config, 1100), rotary_table(config, 1500)
    found = rotary_rows(config, torch.arange(1500), shorter)
    torch.testing.assert_close(found, longer, rtol=0, atol=1e-4)
    assert not torch.equal(found, longer)


def test_a_row_is_a_function_of_its_position_alone(config: ModelConfig) -> None:
    table = rotary_table(config, 64)
    positions = torch.randint(0, 2**40, (257,), generator=torch.Generator().manual_seed(0))
    together = rotary_rows(config, positions, table)
    alone = torch.cat([rotary_rows(config, position.view(1), table) for position in positions])
    assert torch.equal(together, alone)
