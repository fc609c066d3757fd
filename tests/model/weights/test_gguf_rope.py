"""Rope scaling of a GGUF file turns queries and keys as that of the folder it was made from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter

from tests.model.weights.gguf_writer import write_gguf
from tests.model.weights.networks import LONGROPE, tiny_llama, with_metadata
from tokenrelay.model.config import UnsupportedModelError
from tokenrelay.model.families import read_hf_config
from tokenrelay.model.transformer.rope import rotary_table
from tokenrelay.model.weights.errors import CheckpointError
from tokenrelay.model.weights.gguf.checkpoint import GGUFCheckpoint

FACTOR = "llama.rope.scaling.factor"
ORIGINAL = {"original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, **ORIGINAL}


def scale(writer: GGUFWriter, kind: str, factor: float = 4.0) -> GGUFWriter:
    writer.add_string("llama.rope.scaling.type", kind)
    writer.add_rope_scaling_factor(factor)
    return writer


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0, **ORIGINAL},
        YARN,
        YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.5},
        LLAMA3,
        LONGROPE,
    ],
    ids=["linear", "yarn", "yarn, all keys", "llama3", "longrope"],
)
def test_rope_scaling_equals_that_of_the_folder(rope: dict[str, Any], tmp_path: Path) -> None:
    model, path = tiny_llama(rope=rope), tmp_path / "tiny.gguf"
    write_gguf(model, path)
    found, expected = GGUFCheckpoint(path), read_hf_config(model.config.to_dict())
    assert found.config().max_position_embeddings == expected.max_position_embeddings == 128
    for max_len in (30, 128):
        tables = rotary_table(found.config(), max_len), rotary_table(expected, max_len)
        torch.testing.assert_close(*tables, rtol=0, atol=2e-5)  # frequencies were rounded to fp32 on the way


@pytest.mark.parametrize(
    ("add", "attention_factor"),
    [
        (lambda w: None, 1 + 0.1 * math.log(4)),
        (lambda w: w.add_rope_scaling_attn_factors(0.5), 0.5 + 0.05 * math.log(4)),
        (lambda w: w.add_rope_scaling_yarn_log_mul(1.0), 1.0),
        (lambda w: w.add_rope_scaling_yarn_attn_factor(0.75), 0.75),
    ],
    ids=["none", "attn_factor", "yarn_log_multiplier", "yarn_attn_factor"],
)
def test_yarn_s_attention_factor(add: Callable[[GGUFWriter], object], attention_factor: float, tmp_path: Path) -> None:
    path = with_metadata(tmp_path / "x.gguf", lambda w: add(scale(w, "yarn")))
    found = GGUFCheckpoint(path).config().rope_scaling
    assert found is not None
    assert found.attention_factor == pytest.approx(attention_factor, rel=1e-6)


@pytest.mark.parametrize(
    ("add", "longest"),
    [
        (lambda w: w.add_float32("llama.rope.scale_linear", 4.0), 128),  # the key of 2023; context_length is 128
        (lambda w: w.add_rope_scaling_factor(4.0), 128),
        (lambda w: scale(w, "linear").add_rope_scaling_orig_ctx_len(256), 1024),
        (lambda w: scale(w, "yarn").add_rope_scaling_orig_ctx_len(64), 256),
    ],
)
def test_the_longest_sequence_has_the_factor_in_it(
    add: Callable[[GGUFWriter], object], longest: int, tmp_path: Path
) -> None:
    config = GGUFCheckpoint(with_metadata(tmp_path / "x.gguf", add)).config()
    assert config.rope_scaling is not None
    assert (config.rope_scaling.factor, config.max_position_embeddings) == (4.0, longest)


@pytest.mark.parametrize("add", [lambda w: scale(w, "none"), lambda w: scale(w, "linear", 1.0)])
def test_a_factor_without_a_type_that_uses_it_scales_nothing(
    add: Callable[[GGUFWriter], object], tmp_path: Path
) -> None:
    config = GGUFCheckpoint(with_metadata(tmp_path / "x.gguf", add)).config()
    assert torch.equal(rotary_table(config, 64), rotary_table(replace(config, rope_scaling=None), 64))


@pytest.mark.parametrize(
    ("add", "tensor", "error", "message"),
    [
        (lambda w: scale(w, "mystery"), None, UnsupportedModelError, "'mystery'.*none, linear, yarn, longrope"),
        (lambda w: scale(w, "linear", math.nan), None, CheckpointError, "factor is nan"),
        (
            lambda w: (w.add_string("llama.rope.scaling.type", "yarn"), w.add_float64(FACTOR, 1e308)),
            None,
            CheckpointError,
            "out of range",
        ),
        (
            lambda w: scale(w, "yarn").add_rope_scaling_yarn_ext_factor(0.5),
            None,
            UnsupportedModelError,
            "yarn_ext_factor other than 1",
        ),
        (lambda w: scale(w, "longrope", 1.0), None, CheckpointError, r"rope_factors_short\.weight"),
        (lambda w: scale(w, "longrope", 2.0), None, UnsupportedModelError, "factor beside"),
        (lambda w: None, ("rope_factors_long.weight", 8), CheckpointError, r"rope_factors_short\.weight"),
        (lambda w: None, ("rope_freqs.weight", 5), CheckpointError, r"rope_freqs\.weight.*8 F32"),
        (lambda w: scale(w, "yarn"), ("rope_freqs.weight", 8), UnsupportedModelError, "llama3 beside rope type 'yarn'"),
        (
            lambda w: scale(w, "yarn"),
            ("rope_factors_long.weight", 8),
            UnsupportedModelError,
            "longrope beside rope type",
        ),
        (lambda w: w.add_rope_scaling_attn_factors(1.2), None, UnsupportedModelError, "attn_factor without yarn"),
        (lambda w: None, ("rope_freqs.weight", 8), UnsupportedModelError, "positive"),  # they are zeros here
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    add: Callable[[GGUFWriter], object],
    tensor: tuple[str, int] | None,
    error: type[ValueError],
    message: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        GGUFCheckpoint(with_metadata(tmp_path / "x.gguf", add, tensor))
