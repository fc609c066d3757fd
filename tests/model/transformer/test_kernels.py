"""The native kernels equal the torch reference, and their bits depend on nothing but the row itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenrelay
from tests.model.transformer.paged_request import BLOCK, PagedRequest, cpu_cache, rotary_angles
from tokenrelay.model.transformer import kernels
from tokenrelay.model.transformer.kernels import native, reference
from tokenrelay.model.transformer.kernels.packed_linear import PackedLinear
from tokenrelay.model.transformer.quantization import replace_matrix

WITHOUT_LIBRARY = """
import torch
from tokenrelay.model.transformer import kernels
from tokenrelay.model.transformer.kernels import native
from tokenrelay.model.transformer.kernels.packed_linear import PackedLinear
x, weight = torch.randn(3, 8), torch.randn(5, 8)
torch.testing.assert_close(PackedLinear(weight)(x), x @ weight.T)
assert kernels.rms_norm(x, torch.ones(8), 1e-5).shape == x.shape
assert native.isa() == "none"
print(native.why_unavailable())
"""
DTYPES = [torch.bfloat16, torch.float32]
CACHE_DTYPES = [torch.float32, torch.int16, torch.int8]

needs_native = pytest.mark.skipif(not native.is_available(), reason=native.why_unavailable() or "native library")
pytestmark = [needs_native, pytest.mark.usefixtures("restored_settings")]


def test_without_the_library_the_reference_is_registered(tmp_path: Path) -> None:
    package = tmp_path / "tokenrelay"
    shutil.copytree(Path(tokenrelay.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    run = subprocess.run([sys.executable, "-c", WITHOUT_LIBRARY], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "not built" in run.stdout


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-5)


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [(1, 1), (7, 5), (64, 16), (100, 33), (576, 130)])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 13, 70, 100])
def test_linear_equals_the_reference(rows: int, features: tuple[int, int], dtype: torch.dtype) -> None:
    layer = nn.Linear(*features).to(dtype)
    x = torch.randn(rows, features[0])
    assert layer.bias is not None
    expected = reference.linear(x, layer.weight, layer.bias, features[1])
    close(PackedLinear(layer.weight, layer.bias)(x), expected)
    close(PackedLinear(layer.weight)(x), expected - layer.bias)


def test_replacing_linear_layers_keeps_the_function() -> None:
    network = nn.Sequential(nn.Linear(20, 30), nn.Sequential(nn.ReLU(), nn.Linear(30, 17, bias=False)))
    x = torch.randn(4, 20)
    before = network(x)
    for path in ("0", "1.1"):
        replace_matrix(network, path, None, "auto")
    assert not any(isinstance(module, nn.Linear) for module in network.modules())
    close(network(x), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16), (3, 5), (4, 33), (70, 576)])
def test_norms_equal_the_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual = torch.randn(shape), torch.randn(shape)
    weight, bias = torch.randn(shape[1]).to(dtype), torch.randn(shape[1]).to(dtype)
    close(kernels.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    close(kernels.layer_norm(x, weight, bias, 1e-5), reference.layer_norm(x, weight, bias, 1e-5))
    summed = residual.clone()
    close(kernels.add_rms_norm(x, summed, weight, 1e-5), reference.rms_norm(x + residual, weight, 1e-5))
    assert torch.equal(summed, x + residual)
    summed = residual.clone()
    close(kernels.add_layer_norm(x, summed, weight, None, 1e-5), reference.layer_norm(summed, weight, None, 1e-5))
    assert torch.equal(summed, x + residual)


def inputs_with_edges() -> Tensor:
    edges = torch.tensor([-1e4, -100.0, -88.5, -87.0, 0.0, 88.5, 100.0, 1e4])
    return torch.cat((torch.randn(3, 50) * 4, edges.expand(3, 8)), dim=1)


@pytest.mark.parametrize("kind", reference.ACTIVATIONS)
def test_activations_equal_the_reference(kind: str) -> None:
    x = inputs_with_edges()
    close(kernels.activation(x, kind), reference.activation(x, kind))
    close(kernels.gated_activation(x, kind), reference.gated_activation(x, kind))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 49152), (3, 4097), (20, 5000)])
def test_argmax_is_the_first_of_the_largest(rows: int, columns: int) -> None:
    x = torch.randint(-40, 40, (rows, columns)).float()  # many are largest
    x[:, columns // 2] = torch.arange(rows) * 10.0
    expected = [row.index(max(row)) for row in x.tolist()]
    assert kernels.argmax(x).tolist() == expected
    assert kernels.argmax(x[:, :1].expand(rows, columns).contiguous()).tolist() == [0] * rows


def test_argmax_of_what_is_no_number_is_a_token_all_the_same() -> None:
    x = torch.full((2, 9000), float("nan"))
    x[1] = -torch.inf
    assert kernels.argmax(x).tolist() == [0, 0]


def test_swiglu_oai_is_clamped_and_biased() -> None:
    x = inputs_with_edges()
    gate, up = x.chunk(2, dim=1)
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    expected = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    for operations in (kernels, reference):
        close(operations.gated_activation(x, "swiglu_oai"), expected)
        with pytest.raises(KeyError, match="swiglu_oai"):
            operations.activation(x, "swiglu_oai")


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("head_dim", [8, 40, 64])
def test_head_norm_normalises_q_and_k_where_they_are(head_dim: int, whole: bool) -> None:
    heads, kv_heads = 6, 2
    q, k, v = (torch.randn(70, count, head_dim) for count in (heads, kv_heads, kv_heads))
    weights = [torch.randn(count * head_dim if whole else head_dim) for count in (heads, kv_heads)]
    qkv = torch.cat((q, k, v), dim=1).flatten(1)
    expected = [
        F.rms_norm(x.flatten(1) if whole else x, weight.shape, weight, 1e-5).view_as(x)
        for x, weight in zip((q, k), weights, strict=True)
    ]
    for operations in (kernels, reference):
        result = qkv.clone()
        operations.head_norm(result, *weights, heads, kv_heads, 1e-5)
        close(result, torch.cat((*expected, v), dim=1).flatten(1))


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(8, 8), (16, 0), (24, 24), (64, 64), (80, 32), (24, 6)])
def test_rotate_and_cache_equals_the_reference(head_dim: int, rotary_dim: int) -> None:
    tokens, heads, kv_heads = 70, 6, 2
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim)
    slots = torch.randperm(8 * BLOCK)[:tokens]
    slots[5] = slots[9] = -1
    positions, cos_sin = torch.randint(0, 50, (tokens,)), torch.randn(50, rotary_dim) if rotary_dim else None
    cache = cpu_cache(8, kv_heads, head_dim)[:2]
    expected_cache = cache[0].clone(), cache[1].clone()
    q = kernels.rotate_and_cache(qkv, positions, cos_sin, *cache, slots, heads, kv_heads)
    close(q, reference.rotate_and_cache(qkv, positions, cos_sin, *expected_cache, slots, heads, kv_heads))
    for written, expected in zip(cache, expected_cache, strict=True):
        close(written, expected)


# --- bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_linear_does_not_depend_on_the_other_rows(dtype: torch.dtype) -> None:
    layer = PackedLinear(torch.randn(100, 200).to(dtype), torch.randn(100))
    x = torch.randn(200, 200)
    alone = torch.cat([layer(x[i : i + 1]) for i in range(200)])
    for rows in [*range(1, 41), 200]:
        assert torch.equal(layer(x[:rows]), alone[:rows])


def everything() -> list[Tensor]:
    """The output of every operation on fixed inputs."""
    torch.manual_seed(1)
    x, weight, bias = torch.randn(40, 100), torch.randn(100), torch.randn(100)
    kinds = (*reference.ACTIVATIONS, "swiglu_oai")
    return [
        PackedLinear(torch.randn(130, 100).bfloat16(), torch.randn(130))(x),
        PackedLinear(torch.randn(130, 100))(x),
        kernels.rms_norm(x, weight, 1e-5),
        kernels.layer_norm(x, weight, bias, 1e-5),
        *(kernels.gated_activation(x * 10, kind) for kind in kinds),
        *(PagedRequest(100, 9, 3, 24, dtype).forward(0, 100) for dtype in CACHE_DTYPES),
        *(PagedRequest(200, 4, 4, 64, dtype, 40).forward(0, 200) for dtype in CACHE_DTYPES),
        *(PagedRequest(200, 2, 1, 64, dtype, 40, 5).forward(0, 200) for dtype in CACHE_DTYPES),
        *(request_of_a_newer_family(dtype).forward(0, 200) for dtype in CACHE_DTYPES),
    ]


def request_of_a_newer_family(dtype: torch.dtype) -> PagedRequest:
    request = PagedRequest(200, 6, 2, 72, dtype, 90)
    kernels.head_norm(request.qkv, torch.randn(72), torch.randn(144), 6, 2, 1e-6)
    request.cos_sin, request.softcap, request.sink_logits = rotary_angles(200, 20), 3.0, torch.randn(6)
    return request


def same_bits(vary: Callable[[], object]) -> bool:
    before = everything()
    vary()
    return all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))


@pytest.mark.parametrize("isa", native.ISA_NAMES)
def test_every_instruction_set_gives_the_same_bits(isa: str) -> None:
    def change() -> None:
        if not native.set_isa(isa):
            pytest.skip(f"this processor has no {isa}")

    assert same_bits(change)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_does_not_matter(threads: int) -> None:
    assert same_bits(lambda: native.set_num_threads(threads))
