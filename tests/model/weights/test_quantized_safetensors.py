"""Folders that others quantized, packed here by the formats' public descriptions: what they mean is what is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from structlog.testing import capture_logs
from torch import Tensor

from tests.model.weights.networks import expected_tensors, tiny_llama
from tokenrelay.model.config import EngineConfig, UnsupportedModelError
from tokenrelay.model.engine.engine import Engine
from tokenrelay.model.engine.request import Request
from tokenrelay.model.quantized import Quantized
from tokenrelay.model.sampling_params import SamplingParams
from tokenrelay.model.weights.errors import CheckpointError
from tokenrelay.model.weights.quantized_formats import Parts, mxfp4
from tokenrelay.model.weights.safetensors import SafetensorsCheckpoint

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of a word's eight, from its lowest bits on
Packed = tuple[dict[str, Tensor], Tensor]  # a matrix's tensors by suffix, and what they mean [N, K]


def words(numbers: Tensor, bits: int) -> Tensor:
    """[..., n] -> int32 [..., n bits / 32], the first number in the lowest bits."""
    grouped = numbers.long().reshape(*numbers.shape[:-1], -1, 32 // bits)
    whole = (grouped << (torch.arange(32 // bits) * bits)).sum(-1)
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).int()


def rounded(weight: Tensor, bits: int, size: int, zero: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """[N, K] -> integers [N, K], zero points and scales [N, groups]. ``zero``: of all, for symmetric ones."""
    groups, top = weight.reshape(len(weight), -1, size), (1 << bits) - 1
    if zero is None:
        low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
        scales = ((high - low) / top).half()
        zeros = (-low / scales).round().clamp(1, top).int()
    else:
        scales = (groups.abs().amax(2) / (zero - 1)).half()
        zeros = torch.full_like(scales, zero, dtype=torch.int32)
    integers = (groups / scales.float().unsqueeze(2)).round() + zeros.unsqueeze(2)
    return integers.clamp(0, top).int().flatten(1), zeros, scales


def meaning(integers: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    return (integers - zeros[:, groups]) * scales.float()[:, groups]


def in_order(weight: Tensor, size: int) -> Tensor:
    return torch.arange(weight.shape[1]) // size


def awq(weight: Tensor, size: int = 32) -> Packed:
    integers, zeros, scales = rounded(weight, 4, size, None)
    shuffled = [
        values.T.reshape(values.shape[1], -1, 8)[..., list(AWQ_COLUMNS)].flatten(1) for values in (integers, zeros)
    ]
    packed = {".qweight": words(shuffled[0], 4), ".qzeros": words(shuffled[1], 4), ".scales": scales.T.contiguous()}
    return packed, meaning(integers, zeros, scales, in_order(weight, size))


def gptq(weight: Tensor, bits: int = 4, size: int = 32, zero: int | None = None, *, act_order: bool = False) -> Packed:
    groups = in_order(weight, size)
    if act_order:
        groups = groups[torch.randperm(len(groups))]
    sorted_by_group = groups.argsort(stable=True)
    in_groups, zeros, scales = rounded(weight[:, sorted_by_group], bits, size, zero)
    integers = torch.empty_like(in_groups)
    integers[:, sorted_by_group] = in_groups
    packed = {
        ".qweight": words(integers, bits).T.contiguous(),
        ".qzeros": words((zeros - 1).T.contiguous(), bits),
        ".scales": scales.T.contiguous(),
        ".g_idx": groups.int(),
    }
    return packed, meaning(integers, zeros, scales, groups)


def compressed(weight: Tensor, bits: int = 8, size: int = 0, *, pack: bool = False, symmetric: bool = True) -> Packed:
    middle = 1 << (bits - 1)
    integers, zeros, scales = rounded(weight, bits, size or weight.shape[1], middle if symmetric else None)
    packed = {".weight_scale": scales}
    if pack:
        shape = torch.tensor(weight.shape)
        packed |= {".weight_packed": words(integers, bits), ".weight_shape": shape}
        if not symmetric:
            packed[".weight_zero_point"] = words(zeros.T.contiguous(), bits).T.contiguous()
    else:
        packed[".weight"] = (integers - middle).to(torch.int8)
    return packed, meaning(integers, zeros, scales, in_order(weight, size or weight.shape[1]))


def described(bits: int, size: int, form: str) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "group_size": size or None}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": {"weights": weights}}}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
FORMATS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Packed], str]] = {
    "AWQ": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq, "stay in 4 bits"),
    "GPTQ": (GPTQ, gptq, "stay in 4 bits"),
    "GPTQ, symmetric": (GPTQ, lambda w: gptq(w, zero=8), "stay in 4 bits"),
    "GPTQ, one group a row": (
        GPTQ | {"group_size": -1},
        lambda w: gptq(w, size=w.shape[1]),
        "stay in 4 bits",
    ),
    "GPTQ, act-order": (GPTQ | {"desc_act": True}, lambda w: gptq(w, act_order=True), "dequantized: act-order"),
    "GPTQ, groups of 16": (
        GPTQ | {"group_size": 16},
        lambda w: gptq(w, size=16),
        "dequantized: groups that are no multiples of 32",
    ),
    "GPTQ, 8 bits": (GPTQ | {"bits": 8}, lambda w: gptq(w, 8, 32, 128), "stay in 8 bits"),
    "GPTQ, 8 bits, asymmetric": (
        GPTQ | {"bits": 8},
        lambda w: gptq(w, 8, 32),
        "dequantized: 8 bits with zero points",
    ),
    "W8A8": (described(8, 0, "int-quantized"), compressed, "stay in 8 bits"),
    "W8A16": (described(8, 32, "pack-quantized"), lambda w: compressed(w, 8, 32, pack=True), "stay in 8 bits"),
    "W4A16": (described(4, 32, "pack-quantized"), lambda w: compressed(w, 4, 32, pack=True), "stay in 4 bits"),
    "W4A16, asymmetric": (
        described(4, 32, "pack-quantized"),
        lambda w: compressed(w, 4, 32, pack=True, symmetric=False),
        "stay in 4 bits",
    ),
}


def write(folder: Path, config: Mapping[str, Any], pack: Callable[[Tensor], Packed]) -> dict[str, Tensor]:
    """A tiny Llama whose matrices are packed; returns what all tensors mean."""
    model = tiny_llama(tie=False)
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": dict(config)}))
    stored, meant = {}, {}
    for name, tensor in expected_tensors(model).items():
        meant[name] = stored[name] = tensor.detach().clone()
        if name.endswith("_proj.weight"):
            packed, meant[name] = pack(stored.pop(name))
            stored |= {name.removesuffix(".weight") + suffix: part for suffix, part in packed.items()}
    save_file(stored, folder / "model.safetensors")
    return meant


@pytest.mark.parametrize("name", FORMATS)
def test_its_tensors_mean_what_was_packed(name: str, tmp_path: Path) -> None:
    config, pack, became = FORMATS[name]
    meant = write(tmp_path, config, pack)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    with capture_logs() as lines:
        stored = dict(checkpoint.stored())
    assert [line["became"] for line in lines] == [f"14 of 14 {became}"]
    found = dict(checkpoint.tensors())
    assert stored.keys() == found.keys() == meant.keys()
    for tensor, expected in meant.items():
        torch.testing.assert_close(found[tensor], expected, rtol=1e-6, atol=1e-7)
        kept = stored[tensor]
        as_stored = kept.dequantized() if isinstance(kept, Quantized) else kept
        torch.testing.assert_close(as_stored, expected, rtol=2e-3, atol=2e-3)


def logprobs_of(folder: Path, **options: Any) -> list[float]:
    """Of a prompt's tokens."""
    engine = Engine.from_model(str(folder), EngineConfig(num_blocks=16), dtype="float32", device="cpu", **options)
    engine.add(Request("a", list(range(3, 40)), SamplingParams(max_tokens=1, prompt_logprobs=0)))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return [entry.logprob for entry in outputs[0].prompt_logprobs if entry is not None]


@pytest.mark.parametrize("name", ["AWQ", "GPTQ, act-order", "W8A8", "W4A16, asymmetric"])
def test_the_network_says_what_the_dequantized_one_says(name: str, tmp_path: Path) -> None:
    write(tmp_path, *FORMATS[name][:2])
    kept, dequantized = logprobs_of(tmp_path), logprobs_of(tmp_path, quantization="none")
    assert math.dist(kept, dequantized) <= 0.01 * math.hypot(*dequantized)


def test_the_parts_of_a_matrix_may_lie_in_several_files(tmp_path: Path) -> None:
    meant = write(tmp_path, GPTQ, gptq)
    tensors = dict(SafetensorsCheckpoint(tmp_path)._files())
    shards = {f"{i}.safetensors": dict(list(tensors.items())[i::2]) for i in range(2)}
    (tmp_path / "model.safetensors").unlink()
    for shard, part in shards.items():
        save_file({name: tensor.clone() for name, tensor in part.items()}, tmp_path / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = dict(SafetensorsCheckpoint(tmp_path).tensors())
    assert all(torch.allclose(found[name], meant[name], atol=1e-6) for name in meant)


@pytest.mark.parametrize(
    ("name", "suffix", "damage", "message"),
    [
        ("GPTQ", ".scales", None, r"q_proj\.scales' is missing"),
        ("GPTQ", ".qweight", None, r"q_proj\.(qzeros|scales|g_idx)"),
        ("GPTQ", ".qzeros", lambda t: t[:, :1], r"q_proj\.qzeros' .*shape \[2, 1\], expected .*\[2, 8\]"),
        ("GPTQ", ".g_idx", lambda t: t + 5, r"q_proj\.g_idx' names groups that there are not"),
        ("AWQ", ".qweight", lambda t: t.long(), r"q_proj\.qweight' is torch.int64"),
        ("AWQ", ".qweight", lambda t: t[:32], r"q_proj\.qzeros' .*expected .*\[1, 8\]"),
        ("W8A8", ".weight_scale", None, r"q_proj\.weight' holds integers"),
        ("W8A8", ".weight_scale", lambda t: t[:3], r"q_proj\.weight_scale' .*shape \[3, 1\]"),
        ("W4A16", ".weight_packed", lambda t: t[:3], r"q_proj\.weight_packed' .*shape \[3, 8\], expected .*\[64, 8\]"),
        ("W4A16", ".weight_scale", None, r"q_proj\.weight_scale' is missing"),
    ],
)
def test_what_is_damaged_is_named(
    name: str, suffix: str, damage: Callable[[Tensor], Tensor] | None, message: str, tmp_path: Path
) -> None:
    write(tmp_path, *FORMATS[name][:2])
    tensors = {key: tensor.clone() for key, tensor in SafetensorsCheckpoint(tmp_path)._files()}
    damaged = "model.layers.0.self_attn.q_proj" + suffix
    whole = tensors.pop(damaged)
    if damage is not None:
        tensors[damaged] = damage(whole).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as refused:
        Engine.from_model(str(tmp_path), EngineConfig(num_blocks=4), device="cpu")
    assert not isinstance(refused.value, KeyError)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "'bitsandbytes' is not supported; known: awq, compressed-tensors",
        ),
        (GPTQ | {"bits": 3}, "gptq with bits=3 is not supported; known: 4, 8"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq with version='gemv'"),
        (described(8, 0, "float-quantized"), "compressed-tensors with format='float-quantized'"),
    ],
)
def test_what_is_not_known_is_refused_by_name(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, config, gptq)
    with pytest.raises(UnsupportedModelError, match=message):
        SafetensorsCheckpoint(tmp_path)


def test_mxfp4_means_its_floats() -> None:
    """[experts, rows, groups, bytes] -> [experts, columns, rows]."""
    blocks = torch.zeros(2, 3, 1, 16, dtype=torch.uint8)
    blocks[1, 2, 0, 0] = 0x97  # 6.0, then -0.5
    scales = torch.full((2, 3, 1), 127, dtype=torch.uint8)
    scales[1, 2] = 129
    found = mxfp4(Parts("x", {"_blocks": blocks, "_scales": scales}), {})
    assert not isinstance(found, Quantized)
    assert found.shape == (2, 32, 3)
    assert found[1, :3, 2].tolist() == [24.0, -2.0, 0.0]
    with pytest.raises(CheckpointError, match="x_scales"):
        mxfp4(Parts("x", {"_blocks": blocks, "_scales": scales[:1]}), {})
