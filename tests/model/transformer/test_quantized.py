"""Linear layers of 8 and 4 bits: their values are the reference's, their bits depend on nothing but the row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenrelay.model.quantized import GROUP, Quantized, quantize, stacked
from tokenrelay.model.transformer import kernels
from tokenrelay.model.transformer.kernels import native, reference
from tokenrelay.model.transformer.kernels.packed_linear import PackedLinear, QuantizedLinear

pytestmark = [
    pytest.mark.skipif(not native.is_available(), reason=native.why_unavailable() or "native library"),
    pytest.mark.usefixtures("restored_settings"),
]
FEATURES = [(32, 1), (64, 33), (576, 130), (3200, 20)]  # 3200 are three blocks of K
ROWS = [1, 2, 3, 4, 5, 9, 100]
MANY = 1529  # columns: tasks of several panels, an odd number of them, the last one not whole


def weight_of(bits: int, in_features: int, out_features: int) -> Quantized:
    """Every integer that the bits allow, -128 too: a GGUF may hold it."""
    groups = in_features // GROUP
    scales = torch.rand(out_features, groups).half() / 50
    if bits == 8:
        return Quantized(torch.randint(-128, 128, (out_features, in_features), dtype=torch.int8), scales)
    integers = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8)
    return Quantized(integers, scales, torch.randn(out_features, groups).half() / 10)


def rows_of(count: int, features: int) -> Tensor:
    """Of very different sizes, as activations are."""
    return torch.randn(count, features) * torch.randn(count, features).exp()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("rows", ROWS)
def test_it_equals_the_reference(rows: int, features: tuple[int, int], bits: int) -> None:
    weight, bias, x = weight_of(bits, *features), torch.randn(features[1]), rows_of(rows, features[0])
    layer = QuantizedLinear(weight, bias)
    expected = reference.quantized_linear(x, layer.panels, layer.scales, layer.minima, bias, features[1])
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_reference_is_the_product_of_what_was_rounded(bits: int) -> None:
    weight, x = weight_of(bits, 96, 40), rows_of(7, 96)
    layer = QuantizedLinear(weight)
    integers, scales = reference.quantized_activations(x)
    rounded = (integers * scales.unsqueeze(-1)).view(7, 96)
    outlier = (integers.abs() > 127).any(-1)
    assert 0 < outlier.sum() < outlier.numel()
    assert ((rounded - x).abs() <= scales.repeat_interleave(GROUP, dim=1) * 0.501).all()
    found = reference.quantized_linear(x, layer.panels, layer.scales, layer.minima, None, 40)
    torch.testing.assert_close(found, rounded @ weight.dequantized().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_with_as_many_outliers_as_fit(bits: int, isa: str) -> None:
    """Less than one element in 36 can be more than six times the root mean square; here each has a place of its own."""
    features, most = 1152, 31
    layer, x = QuantizedLinear(weight_of(bits, features, 40)), torch.randn(200, features) / 1000
    for row in x:
        row[torch.randperm(features)[:most]] = 1.0
    x[0], x[1, 1:] = 0, 0
    assert (reference.quantized_activations(x)[0].abs() > 127).sum() == 198 * most + 1
    expected = reference.quantized_linear(x, layer.panels, layer.scales, layer.minima, None, 40)
    if not native.set_isa(isa):
        pytest.skip(f"this processor has no {isa}")
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("kind", "bits"), [(QuantizedLinear, 8), (QuantizedLinear, 4), (PackedLinear, 8)])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(
    kind: type[QuantizedLinear] | type[PackedLinear], bits: int
) -> None:
    layer, x = kind(weight_of(bits, 576, MANY), torch.randn(MANY)), rows_of(113, 576)
    together = layer(x)
    for threads in (1, 2, 3):
        native.set_num_threads(threads)
        assert torch.equal(layer(x), together)
    for begin, end in ((0, 1), (50, 52), (7, 20), (7, 40), (16, 113)):
        assert torch.equal(layer(x[begin:end]), together[begin:end])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_bits(isa: str, bits: int) -> None:
    layer, x = QuantizedLinear(weight_of(bits, 576, MANY), torch.randn(MANY)), rows_of(113, 576)
    expected = layer(x)
    if not native.set_isa(isa):
        pytest.skip(f"this processor has no {isa}")
    assert torch.equal(layer(x), expected)


def test_all_extremes_at_once_do_not_overflow() -> None:
    x = torch.full((5, 64), 3.0)
    x[1:] *= -1
    for integer, bits in ((-128, 8), (127, 8), (15, 4)):
        integers = torch.full((17, 64), integer, dtype=torch.int8 if bits == 8 else torch.uint8)
        ones = torch.ones(17, 2).half()
        layer = QuantizedLinear(Quantized(integers, ones, None if bits == 8 else 0 * ones))
        torch.testing.assert_close(layer(x), x[:, :1].expand(5, 17) * 64 * integer)


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_not_finite_stays_so_and_in_its_row(bits: int) -> None:
    layer, x = QuantizedLinear(weight_of(bits, 64, 20)), rows_of(4, 64)
    x[1, 3], x[2, 40], x[3, :32] = torch.nan, torch.inf, 0
    found = layer(x)
    assert found[1].isnan().all()
    assert not found[2].isfinite().any()
    assert torch.equal(found[[0, 3]], layer(x[[0, 3]]))


def test_eight_bits_are_within_half_a_step() -> None:
    weight = torch.randn(50, 128) * torch.logspace(-2, 2, 50).unsqueeze(1)
    weight[3] = 0
    found = quantize(weight)
    steps = found.scales.float().repeat_interleave(GROUP, dim=1)
    clipped = weight.abs() > 127 * steps  # a scale is rounded, too
    assert ((found.dequantized() - weight).abs() <= steps * torch.where(clipped, 0.6, 0.501) + 3e-8).all()


def test_matrices_of_one_kind_stack_exactly_and_others_nearly() -> None:
    eight, four = weight_of(8, 64, 5), weight_of(4, 64, 7)
    assert torch.equal(stacked([four, four]).dequantized(), torch.cat([four.dequantized()] * 2))
    mixed = stacked([eight, four])
    assert mixed.minima is None
    torch.testing.assert_close(
        mixed.dequantized(), torch.cat([eight.dequantized(), four.dequantized()]), rtol=0, atol=0.02
    )


def test_fake_tensors_get_its_shape() -> None:
    layer = QuantizedLinear(weight_of(4, 64, 20)).to("meta")
    out = kernels.quantized_linear(
        torch.empty(3, 64, device="meta"), layer.panels, layer.scales, layer.minima, None, 20
    )
    assert out.shape == (3, 20)
