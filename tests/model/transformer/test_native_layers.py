"""All layers in one native call give the bits of the layers one by one, or are left to these."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import accumulate

import pytest
import torch
from torch import Tensor, nn

from tests.model.transformer.paged_request import BLOCK, cpu_cache
from tokenrelay.model.config import Experts, ModelConfig
from tokenrelay.model.families import Rule
from tokenrelay.model.transformer.attention import AttentionMetadata
from tokenrelay.model.transformer.decoder_layer import DecoderLayer
from tokenrelay.model.transformer.kernels import native
from tokenrelay.model.transformer.kernels.native_layers import (
    OBEYED,
    OUTSIDE,
    NativeLayers,
    covers,
    replace_layers,
)
from tokenrelay.model.transformer.kv_cache import LayerCache
from tokenrelay.model.transformer.loading import load_transformer
from tokenrelay.model.transformer.transformer import Transformer

MAX_LEN, VOCAB, LAYERS = 160, 96, 3
QUERIES, LENGTHS = (40, 1, 1, 3), (100, 9, 150, 3)  # of the requests in one step
PLAIN = ModelConfig(
    architecture="test",
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_layers=LAYERS,
    num_heads=4,
    num_kv_heads=2,
    head_dim=24,
    max_position_embeddings=MAX_LEN,
    norm="rms",
    norm_eps=1e-6,
    activation="silu",
    gated_mlp=True,
    positions="rotary",
)
SWITCHES: dict[str, dict[str, object]] = {
    "nothing": {},
    "heads normalised": {"qk_norm": "head"},
    "all heads normalised as one": {"qk_norm": "whole"},
    "part of a head rotated": {"rotary_dim": 10},
    "nothing rotated": {"positions": "none"},
    "scores capped": {"attention_softcap": 2.0, "attention_scale": 0.7},
    "learned sinks": {"learned_sinks": True, "sliding_window": 20, "full_attention_layers": frozenset({1})},
    "angles by layer": {
        "sliding_window": 20,
        "full_attention_layers": frozenset({0}),
        "local_rope_theta": 100.0,
        "unrotated_layers": frozenset({2}),
    },
    "norms after": {"norm_placement": "post", "qk_norm": "whole"},
    "norms before and after": {"norm_placement": "sandwich", "residual_scale": 0.3},
    "side by side": {"parallel_residual": True, "norm": "layer", "rotary_dim": 6, "residual_scale": 0.3},
    "side by side after one norm": {
        "parallel_residual": True,
        "shared_norm": True,
        "norm": "layer",
        "gated_mlp": False,
    },
    "layer norms without bias": {"norm": "layer", "norm_bias": False, "positions": "learned"},
    "no final norm": {"final_norm": False, "residual_scale": 0.5},
    "biases and squares": {
        **{"attention_bias": True, "output_bias": True, "mlp_bias": True},
        **{"gated_mlp": False, "activation": "relu2"},
    },
    "clamped gates": {"activation": "swiglu_oai", "mlp_bias": True},
}

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.why_unavailable() or "native library")


def config_with(switches: dict[str, object]) -> ModelConfig:
    return dataclasses.replace(PLAIN, **switches)  # type: ignore[arg-type]


def random_model(config: ModelConfig, *, in_8_bits: bool = False, attention_sinks: int = 0) -> Transformer:
    torch.manual_seed(0)
    with torch.device("meta"):
        names = {name: tensor.shape for name, tensor in Transformer(config, MAX_LEN).named_parameters()}
    return load_transformer(
        config,
        [(name, torch.randn(shape) * 0.3) for name, shape in names.items()],
        [Rule("(.*)", r"\1")],
        max_model_len=60 if attention_sinks else MAX_LEN,
        attention_sinks=attention_sinks,
        dtype=torch.float32 if in_8_bits else torch.bfloat16,
        device=torch.device("cpu"),
        quantization="int8" if in_8_bits else "none",
    )


def hidden_states_and_cache(
    model: Transformer, dtype: torch.dtype, sink_positions_below: int = 0, results: Sequence[int] | None = None
) -> tuple[Tensor, list[LayerCache]]:
    """One step of several requests, prefill and decode, over a cache of random content."""
    torch.manual_seed(1)
    cache = [cpu_cache(40, PLAIN.num_kv_heads, PLAIN.head_dim, dtype) for _ in range(LAYERS)]
    tables = torch.randperm(40).view(len(LENGTHS), -1)
    spans = [torch.arange(length - query, length) for query, length in zip(QUERIES, LENGTHS, strict=True)]
    slots = [table[span // BLOCK] * BLOCK + span % BLOCK for table, span in zip(tables, spans, strict=True)]
    positions = torch.cat(spans)
    metadata = AttentionMetadata(
        torch.cat(slots),
        tables.int(),
        torch.tensor([0, *QUERIES]).cumsum(0).int(),
        torch.tensor(LENGTHS).int(),
        None if results is None else torch.tensor(results).int(),
        positions.clamp(max=sink_positions_below - 1) if sink_positions_below else None,
    )
    return model(torch.randint(0, VOCAB, positions.shape), positions, cache, metadata), cache


@torch.inference_mode()
def check_that_the_bits_are_those_of_the_layers(model: Transformer, dtype: torch.dtype, sinks_below: int = 0) -> None:
    assert isinstance(model.run_layers, NativeLayers)
    hidden, cache = hidden_states_and_cache(model, dtype, sinks_below)
    del model.run_layers  # its own again
    expected, expected_cache = hidden_states_and_cache(model, dtype, sinks_below)
    assert hidden.isfinite().all()
    assert hidden.std() > 1e-3
    assert torch.equal(hidden, expected)
    for written, correct in zip(cache, expected_cache, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(written, correct, strict=True) if a is not None and b is not None)


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_one_call_gives_the_bits_of_many(switches: dict[str, object]) -> None:
    check_that_the_bits_are_those_of_the_layers(random_model(config_with(switches)), torch.int16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.int8])
@pytest.mark.parametrize("in_8_bits", [False, True])
def test_whatever_weights_and_cache_are_stored_as(in_8_bits: bool, dtype: torch.dtype) -> None:
    config = config_with({"norm_placement": "sandwich", "qk_norm": "head", "attention_softcap": 3.0})
    check_that_the_bits_are_those_of_the_layers(random_model(config, in_8_bits=in_8_bits), dtype)


def check_that_rows_nobody_asks_for_change_nothing(model: Transformer, sinks_below: int = 0) -> None:
    with torch.inference_mode():
        hidden, cache = hidden_states_and_cache(model, torch.int16, sinks_below)
        hidden = hidden.clone()  # the next call overwrites it
    for results in ((1, 1, 1, 3), (0, 1, 0, 1), (0, 0, 0, 0), (17, 0, 1, 2)):
        with torch.inference_mode():
            asked, written = hidden_states_and_cache(model, torch.int16, sinks_below, results)
        for end, count in zip(accumulate(QUERIES), results, strict=True):
            assert torch.equal(asked[end - count : end], hidden[end - count : end])
        for ours, theirs in zip(written, cache, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None)


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_rows_that_nobody_asks_for_change_nothing(switches: dict[str, object]) -> None:
    check_that_rows_nobody_asks_for_change_nothing(random_model(config_with(switches)))


def test_nor_do_they_where_a_text_outgrew_the_context() -> None:
    model = random_model(config_with({"rotary_dim": 12}), attention_sinks=4)
    check_that_rows_nobody_asks_for_change_nothing(model, sinks_below=60)


def test_a_text_that_outgrew_the_context() -> None:
    model = random_model(config_with({"rotary_dim": 12}), attention_sinks=4)
    check_that_the_bits_are_those_of_the_layers(model, torch.int16, sinks_below=60)


def test_every_switch_changes_something() -> None:
    """Else the comparisons above would compare nothing."""
    with torch.inference_mode():
        states = [
            hidden_states_and_cache(random_model(config_with(switches)), torch.int16)[0]
            for switches in SWITCHES.values()
        ]
    for index, hidden in enumerate(states):
        assert not any(torch.equal(hidden, other) for other in states[:index])


def test_what_is_not_covered_is_left_to_the_layers() -> None:
    experts = Experts(num_experts=4, num_experts_per_token=2, intermediate_size=32)
    assert not covers(config_with({"experts": experts}))
    assert not covers(config_with({"head_dim": 272}))
    model = random_model(config_with({"norm_placement": "after_sum"}))
    assert "run_layers" not in vars(model)


def test_a_switch_that_nobody_decided_about_is_left_to_the_layers() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class NextYearsConfig(ModelConfig):
        spiking_neurons: bool = False

    plain = {field.name: getattr(PLAIN, field.name) for field in dataclasses.fields(PLAIN)}
    assert covers(NextYearsConfig(**plain))
    assert not covers(NextYearsConfig(**plain, spiking_neurons=True))
    assert set(plain) > OBEYED | OUTSIDE


def test_a_matrix_that_something_else_stands_for_is_left_to_the_layers() -> None:
    model = random_model(PLAIN)
    del model.run_layers
    layer = model.layers[1]
    assert isinstance(layer, DecoderLayer)
    layer.attention.register_module("o_proj", nn.Sequential(layer.attention.o_proj))
    replace_layers(model)
    assert "run_layers" not in vars(model)
