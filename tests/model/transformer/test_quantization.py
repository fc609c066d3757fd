"""What takes a linear layer's place: its values, its bits, what it costs, and where it is refused."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.model.transformer.paged_request import cpu_cache
from tests.model.transformer.test_fake_cuda import LLAMA
from tokenrelay.model.config import ModelConfig, Quantization
from tokenrelay.model.families.llama import RULES
from tokenrelay.model.quantized import GROUP, Quantized, quantize, quantize_to_4_bits
from tokenrelay.model.transformer.attention import AttentionMetadata
from tokenrelay.model.transformer.kernels import native
from tokenrelay.model.transformer.kernels.fp8_linear import Fp8Linear
from tokenrelay.model.transformer.kernels.packed_linear import EmbeddingRows, PackedLinear, QuantizedLinear
from tokenrelay.model.transformer.loading import load_transformer, materialise
from tokenrelay.model.transformer.quantization import (
    check_quantization,
    describe_weights,
    replace_matrix,
    weight_bytes,
)
from tokenrelay.model.transformer.transformer import Transformer

needs_native = pytest.mark.skipif(not native.is_available(), reason=native.why_unavailable() or "native library")
pytestmark = [needs_native, pytest.mark.usefixtures("restored_settings")]

CPU = torch.device("cpu")
TIED = dataclasses.replace(LLAMA, tie_word_embeddings=True)
TOLERANCES: dict[Quantization, float] = {"none": 0.02, "int8": 0.03, "int8-weight-only": 0.02, "int4": 0.3}


def stored_weights(config: ModelConfig) -> dict[str, Tensor]:
    """Random, under transformers' names."""
    torch.manual_seed(0)
    hidden, kv, wide = config.hidden_size, config.kv_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (config.vocab_size, hidden), "model.norm": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["lm_head"] = (config.vocab_size, hidden)
    for i in range(config.num_layers):
        matrices = {
            "q_proj": (hidden, hidden),
            "k_proj": (kv, hidden),
            "v_proj": (kv, hidden),
            "o_proj": (hidden, hidden),
        }
        shapes |= {f"model.layers.{i}.self_attn.{name}": shape for name, shape in matrices.items()}
        shapes |= {f"model.layers.{i}.mlp.{name}_proj": (wide, hidden) for name in ("gate", "up")}
        shapes[f"model.layers.{i}.mlp.down_proj"] = (hidden, wide)
        shapes |= {f"model.layers.{i}.{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
    return {f"{name}.weight": torch.randn(shape) / math.sqrt(shape[-1]) for name, shape in shapes.items()}


def loaded(config: ModelConfig, quantization: Quantization) -> Transformer:
    return load_transformer(
        config,
        stored_weights(config).items(),
        RULES,
        max_model_len=64,
        dtype=torch.bfloat16,
        device=CPU,
        quantization=quantization,
    )


@torch.inference_mode()
def logits_of(model: Transformer, ids: Tensor) -> Tensor:
    count = len(ids)
    cache = [cpu_cache(4, model.config.num_kv_heads, model.config.head_dim, torch.float32) for _ in model.layers]
    metadata = AttentionMetadata(
        torch.arange(count),
        torch.arange(4, dtype=torch.int32).unsqueeze(0),
        torch.tensor([0, count], dtype=torch.int32),
        torch.tensor([count], dtype=torch.int32),
    )
    return model.compute_logits(model(ids, torch.arange(count), cache, metadata))


@pytest.mark.parametrize("config", [LLAMA, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("quantization", TOLERANCES)
def test_a_network_says_nearly_the_same(quantization: Quantization, config: ModelConfig) -> None:
    ids = torch.randint(0, config.vocab_size, (40,))
    expected = logits_of(load_fp32(config), ids)
    found = logits_of(loaded(config, quantization), ids)
    assert (found - expected).norm() <= TOLERANCES[quantization] * expected.norm()


def load_fp32(config: ModelConfig) -> Transformer:
    weights = stored_weights(config).items()
    return load_transformer(
        config, weights, RULES, max_model_len=64, dtype=torch.float32, device=CPU, quantization="none"
    )


@pytest.mark.parametrize("quantization", TOLERANCES)
def test_all_layers_in_one_call_give_the_bits_of_each_alone(quantization: Quantization) -> None:
    ids = torch.randint(0, LLAMA.vocab_size, (40,))
    model = loaded(LLAMA, quantization)
    at_once = logits_of(model, ids)
    del model.run_layers
    assert torch.equal(logits_of(model, ids), at_once)


def test_fewer_bits_take_less_memory() -> None:
    sizes = [weight_bytes(loaded(LLAMA, quantization)) for quantization in ("none", "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True)
    assert weight_bytes(loaded(LLAMA, "int8")) == weight_bytes(loaded(LLAMA, "int8-weight-only"))


@pytest.mark.parametrize("quantization", TOLERANCES)
def test_a_tied_embedding_is_the_head_s_matrix(quantization: Quantization) -> None:
    model = loaded(TIED, quantization)
    assert isinstance(model.embed_tokens, EmbeddingRows)
    assert model.embed_tokens.matrix is model.get_submodule("lm_head")
    assert weight_bytes(model) < weight_bytes(loaded(LLAMA, quantization))


def test_the_log_says_how_many_bits() -> None:
    assert "matrices: 8 in 4 bits, 1 in 8 bits" in describe_weights(loaded(TIED, "int4"))
    assert "matrices: 9 in bfloat16" in describe_weights(loaded(TIED, "none"))


def test_what_does_not_divide_into_groups_stays_as_it_is() -> None:
    network = nn.Sequential()
    network.add_module("up_proj", nn.Linear(48, 20))
    replace_matrix(network, "up_proj", None, "int8")
    assert isinstance(network.up_proj, PackedLinear)
    assert network.up_proj.scales is None


# --- 8 bits, activations as they are --------------------------------------------------------------------------------


def weight_only(out_features: int, in_features: int) -> tuple[PackedLinear, Quantized]:
    weight = quantize(torch.randn(out_features, in_features))
    return PackedLinear(weight, torch.randn(out_features)), weight


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("rows", [1, 2, 5, 70])
def test_weights_alone_in_8_bits_multiply_as_what_they_mean(rows: int, isa: str) -> None:
    """To the bit: as the fp32 product of the dequantized matrix."""
    if not native.set_isa(isa):
        pytest.skip(f"this processor has no {isa}")
    layer, weight = weight_only(130, 576)
    x = torch.randn(rows, 576)
    assert torch.equal(layer(x), PackedLinear(weight.dequantized(), layer.bias)(x))


def test_every_layer_gives_single_rows_of_its_matrix() -> None:
    weight, ids = torch.randn(50, 64), torch.tensor([0, 49, 17, 16, 17])
    eight, four = quantize(weight), quantize_to_4_bits(weight)
    for layer, meant in (
        (PackedLinear(weight), weight),
        (PackedLinear(weight.bfloat16()), weight.bfloat16()),
        (PackedLinear(eight), eight.dequantized()),
        (QuantizedLinear(eight), eight.dequantized()),
        (QuantizedLinear(four), four.dequantized()),
    ):
        assert torch.equal(layer.rows(ids), meant[ids])


# --- 4 bits ---------------------------------------------------------------------------------------------------------


def test_four_bits_are_searched_for() -> None:
    weight = torch.randn(64, 256)
    low, high = weight.view(-1, GROUP).aminmax(dim=1, keepdim=True)
    whole_range = ((weight.view(-1, GROUP) - low) / (high - low) * 15).round() / 15 * (high - low) + low
    error = (quantize_to_4_bits(weight).dequantized() - weight).square().sum()
    assert error < 0.85 * (whole_range.view_as(weight) - weight).square().sum()


def test_what_has_16_values_stays_itself() -> None:
    scales, minima = torch.rand(8, 3).half(), torch.randn(8, 3).half()
    integers = torch.arange(16, dtype=torch.uint8).repeat(8, 6)
    exact = Quantized(integers, scales, minima).dequantized()
    torch.testing.assert_close(quantize_to_4_bits(exact).dequantized(), exact, rtol=2e-3, atol=2e-3)
    for constant in (0.0, 0.5):
        assert torch.equal(
            quantize_to_4_bits(torch.full((2, 32), constant)).dequantized(), torch.full((2, 32), constant)
        )


# --- devices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quantization", "device"), [("fp8", "cpu"), ("int8", "cuda"), ("fp8", "mps")])
def test_a_device_without_it_is_named(quantization: Quantization, device: str) -> None:
    with pytest.raises(ValueError, match=f"quantization {quantization} is not built for {device}; known: auto, none"):
        check_quantization(quantization, torch.device(device))


@pytest.mark.parametrize(
    ("quantization", "kind"), [("fp8", Fp8Linear), ("int8-weight-only", PackedLinear), ("int4", QuantizedLinear)]
)
@torch.inference_mode()
def test_a_step_on_a_gpu_has_the_right_shapes(quantization: Quantization, kind: type[nn.Module]) -> None:
    cuda, bf16 = torch.device("cuda"), torch.bfloat16
    with torch.device("meta"):
        model = Transformer(LLAMA, 64).to(bf16)
    with FakeTensorMode():
        materialise(model, cuda)
        for path in [path for path, _ in model.named_modules()]:
            replace_matrix(model, path, None, quantization)
        x = torch.empty(5, LLAMA.hidden_size, dtype=bf16, device=cuda)
        widened = model.get_submodule("layers.0.mlp.up_proj")(x)
        embedded = model.embed_tokens(torch.empty(5, dtype=torch.int64, device=cuda))
        logits = model.compute_logits(x)
    assert isinstance(model.get_submodule("layers.1.attention.qkv_proj"), kind)
    assert (tuple(widened.shape), widened.dtype, widened.device.type) == ((5, 2 * 96), bf16, "cuda")
    assert tuple(embedded.shape) == (5, 128)
    assert tuple(logits.shape) == (5, 64)


def test_rows_of_8_bit_floats_are_near_and_keep_their_largest_element() -> None:
    """A NaN of the conversion, which has no infinities, would show."""
    weight = torch.randn(16, 32) * torch.logspace(-3, 3, 16).unsqueeze(1)
    weight[5] = 0
    layer = Fp8Linear(weight)
    meant = layer.weight.float() * layer.scales.T
    steps = weight.abs().amax(1, keepdim=True) / 448 / 8  # of the smallest floats
    assert ((meant - weight).abs() <= weight.abs() * 0.07 + steps).all()
    torch.testing.assert_close(meant.abs().amax(1), weight.abs().amax(1))
