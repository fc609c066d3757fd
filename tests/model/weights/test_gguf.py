"""GGUF tensors equal transformers' layout; damaged files end in an error that names the damage."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import ExpertGatingFuncType, GGUFWriter
from gguf import GGMLQuantizationType as Kind
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from structlog.testing import capture_logs
from transformers import PreTrainedModel

from tests.model.weights.gguf_blocks import random_blocks
from tests.model.weights.gguf_writer import gguf_tensors, write_encoded, write_gguf
from tests.model.weights.networks import LONGROPE, tiny_gpt2, tiny_llama, with_metadata
from tokenrelay.model.config import UnsupportedModelError
from tokenrelay.model.families import read_hf_config
from tokenrelay.model.quantized import Quantized
from tokenrelay.model.transformer.loading import load_transformer
from tokenrelay.model.transformer.placing import WeightsError
from tokenrelay.model.transformer.transformer import Transformer
from tokenrelay.model.weights.checkpoint import open_checkpoint
from tokenrelay.model.weights.config_reader import read_model_config
from tokenrelay.model.weights.errors import CheckpointError
from tokenrelay.model.weights.gguf.checkpoint import GGUFCheckpoint
from tokenrelay.model.weights.gguf.config import config_from_gguf
from tokenrelay.model.weights.gguf.metadata import read_gguf_metadata
from tokenrelay.model.weights.gguf.quantized import quantized_from
from tokenrelay.model.weights.sources import ModelSource, resolve

TOLERANCE = {
    Kind.F32: 0.0,
    Kind.F16: 1e-4,
    Kind.BF16: 1e-3,
    Kind.Q8_0: 1e-3,
    Kind.Q5_1: 1e-2,
    Kind.Q4_0: 2e-2,
    Kind.Q4_1: 2e-2,
}


@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_llama(tie=False), tiny_gpt2])
@pytest.mark.parametrize("kind", TOLERANCE, ids=lambda kind: kind.name)
def test_tensors_equal_those_that_were_written(make: Callable[[], PreTrainedModel], kind: Kind, tmp_path: Path) -> None:
    model, path = make(), tmp_path / "tiny.gguf"
    write_gguf(model, path, kind)
    found, expected = dict(GGUFCheckpoint(path).tensors()), dict(gguf_tensors(model))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].is_contiguous()
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=TOLERANCE[kind])


@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_llama(tie=False), tiny_gpt2])
def test_config_equals_that_of_the_folder(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    model, path = make(), tmp_path / "tiny.gguf"
    write_gguf(model, path)
    expected = read_hf_config(model.config.to_dict())
    found = open_checkpoint(resolve(str(path))).config()
    assert found.norm_eps == pytest.approx(expected.norm_eps, rel=1e-6)
    unlike = {f for f in expected.__slots__ if getattr(found, f) != getattr(expected, f)}
    assert unlike <= {"norm_eps"}


def test_large_tensors_are_whole(tmp_path: Path) -> None:
    """More elements than are dequantized at once, and not a multiple of them."""
    path = tmp_path / "large.gguf"
    write_gguf(tiny_llama(), path)
    rows = np.random.default_rng(0).standard_normal((5000, 64), dtype=np.float32)
    model = tiny_llama()
    model.model.embed_tokens.weight = torch.nn.Parameter(torch.from_numpy(rows))
    write_gguf(model, path, Kind.Q8_0)
    found = dict(GGUFCheckpoint(path).tensors())["token_embd.weight"]
    torch.testing.assert_close(found, torch.from_numpy(rows), rtol=0, atol=2e-2)


def test_smollm2_reads_as_the_gguf_package_dequantizes(smollm2_path: Path) -> None:
    metadata, name = read_gguf_metadata(smollm2_path), "blk.7.ffn_down.weight"
    shapes, found = {}, torch.empty(0)
    for found_name, tensor in GGUFCheckpoint(smollm2_path).tensors(torch.bfloat16):
        shapes[found_name] = tensor.shape
        found = tensor if found_name == name else found
    assert len(shapes) == len(metadata.tensors) == 272
    info = metadata.tensors["blk.7.ffn_down.weight"]
    raw = np.memmap(smollm2_path, np.uint8, "r")[info.offset :][: 576 * 1536 // 32 * 20]
    expected = torch.from_numpy(dequantize(raw.reshape(576, -1), Kind(info.ggml_type))).bfloat16()
    assert torch.equal(found, expected)


def test_smollm2_config(smollm2_path: Path) -> None:
    start = time.perf_counter()
    config = read_model_config(ModelSource("smollm2", smollm2_path, "gguf"))
    assert time.perf_counter() - start < 1.0  # the gguf package's reader takes several seconds
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.rope_theta, config.tie_word_embeddings, config.eos_token_ids) == (100_000.0, True, (2,))


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda w: w.add_value_length(8), "another size for values"),
        (lambda w: w.add_expert_gating_func(ExpertGatingFuncType.SIGMOID), "sigmoid"),
        (lambda w: w.add_clamp_kqv(8.0), "cut off"),
        (lambda w: w.add_rope_scaling_alpha(1000.0), "alpha"),
    ],
)
def test_other_networks_of_the_same_name_are_refused(
    add: Callable[[GGUFWriter], object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        GGUFCheckpoint(with_metadata(tmp_path / "x.gguf", add))


@pytest.mark.parametrize("window", [0, 64])
def test_a_window_makes_it_mistral(window: int, tmp_path: Path) -> None:
    config = GGUFCheckpoint(with_metadata(tmp_path / "x.gguf", lambda w: w.add_sliding_window(window))).config()
    assert config.sliding_window == window


def test_tensors_that_are_missing_extra_or_misshapen_are_named(tmp_path: Path) -> None:
    good, name = dict(gguf_tensors(tiny_llama())), "blk.1.attn_k.weight"
    with pytest.raises(WeightsError, match=r"does not fill layers\.1\.attention\.qkv_proj\.weight \(k\)"):
        load(holding(tmp_path, {n: t for n, t in good.items() if n != name}))
    with pytest.raises(WeightsError, match=r"blk\.1\.mystery\.weight"):
        load(holding(tmp_path, good | {"blk.1.mystery.weight": torch.zeros(1)}))
    with pytest.raises(WeightsError, match=r"blk\.1\.attn_k\.weight.*\[16, 64\], expected \[32, 64\]"):
        load(holding(tmp_path, good | {name: torch.zeros(16, 64)}))
    load(holding(tmp_path, good))


def holding(folder: Path, tensors: Mapping[str, torch.Tensor]) -> GGUFCheckpoint:
    """A file of tiny_llama's description and these tensors."""
    encoded = ((name, values.numpy(), Kind.F32) for name, values in tensors.items())
    return GGUFCheckpoint(write_encoded(tiny_llama().config, folder / "x.gguf", encoded))


def load(checkpoint: GGUFCheckpoint) -> Transformer:
    config, tensors, cpu = checkpoint.config(), checkpoint.tensors(), torch.device("cpu")
    return load_transformer(config, tensors, checkpoint.rules, max_model_len=64, dtype=torch.float32, device=cpu)


NOT_DEQUANTIZED = (Kind.Q8_1, Kind.Q8_K, Kind.Q1_0)
KINDS = [kind for kind in Kind if kind.name.startswith(("Q", "IQ", "TQ", "MXFP")) and kind not in NOT_DEQUANTIZED]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type_is_read_as_the_gguf_package_dequantizes_it(kind: Kind, tmp_path: Path) -> None:
    """Of random bytes, some of whose scales are no numbers; rows are several pieces long."""
    block, size = GGML_QUANT_SIZES[kind]
    rows, columns = 300, 256
    raw = np.random.default_rng(0).integers(0, 256, (rows, columns // block * size), dtype=np.uint8)
    path = with_metadata(
        tmp_path / "x.gguf", lambda w: w.add_tensor("output.weight", raw, raw_dtype=kind), ("output_norm.weight", 64)
    )
    found, in_few_bits = (
        dict(read())["output.weight"] for read in (GGUFCheckpoint(path).tensors, GGUFCheckpoint(path).stored)
    )
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(dequantize(raw, kind))
    assert found.shape == in_few_bits.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_type_that_cannot_be_dequantized_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(tiny_llama(), path)
    name = b"blk.0.attn_v.weight"
    content = bytearray(path.read_bytes())
    at = content.index(name) + len(name) + 4 + 16
    assert struct.unpack_from("<I", content, at) == (Kind.F32,)
    struct.pack_into("<I", content, at, Kind.Q8_1)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_v\.weight.*Q8_1"):
        list(GGUFCheckpoint(path).tensors())


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\x03\x04" + bytes(100), b"GGUF" + struct.pack("<IQQ", 1, 0, 0)])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        read_gguf_metadata(path)


def test_damaged_headers_are_refused_or_harmless(tmp_path: Path) -> None:
    """400 seeded damages: flipped bytes, lengths of any size, truncations. Never another exception, never slow."""
    path, random_ = tmp_path / "x.gguf", random.Random(0)
    write_gguf(tiny_llama(rope=LONGROPE), path)
    good = path.read_bytes()
    header = read_gguf_metadata(path).tensors["token_embd.weight"].offset
    start, refused = time.perf_counter(), 0
    for _ in range(400):
        path.write_bytes(damaged(good, header, random_))
        try:
            list(GGUFCheckpoint(path).tensors())
        except (CheckpointError, UnsupportedModelError):
            refused += 1
    assert refused > 200
    assert time.perf_counter() - start < 20


def damaged(good: bytes, header: int, random_: random.Random) -> bytes:
    content, at = bytearray(good), random_.randrange(header)
    match random_.randrange(3):
        case 0:
            content[at] ^= 1 << random_.randrange(8)
        case 1:
            struct.pack_into("<Q", content, at, random_.choice([2**64 - 1, 2**63, 2**40, len(good), 0]))
        case _:
            del content[random_.randrange(len(content)) :]
    return bytes(content)


def test_counts_that_the_tensors_contradict_are_refused(tmp_path: Path) -> None:
    """Before a network of that size is allocated."""
    path = tmp_path / "x.gguf"
    write_gguf(tiny_llama(), path)
    content = path.read_bytes()
    key = b"llama.block_count"
    at = content.index(key) + len(key) + 4
    path.write_bytes(content[:at] + struct.pack("<I", 4_000_000_000) + content[at + 4 :])
    with pytest.raises(CheckpointError, match=r"blk\.3999999999"):
        config_from_gguf(read_gguf_metadata(path))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1], ids=lambda kind: kind.name)
def test_what_is_stored_in_few_bits_comes_in_few_bits(kind: Kind, tie: bool, tmp_path: Path) -> None:
    """Its meaning is what dequantizing gives, q and k in transformers' order included."""
    path = tmp_path / "tiny.gguf"
    write_gguf(tiny_llama(tie=tie), path, kind)
    checkpoint = GGUFCheckpoint(path)
    stored, expected = dict(checkpoint.stored()), dict(checkpoint.tensors())
    assert stored.keys() == expected.keys()
    assert {name for name, tensor in stored.items() if isinstance(tensor, Quantized)} == {
        name for name, tensor in expected.items() if tensor.dim() == 2
    }
    for name, tensor in stored.items():
        meant = tensor.dequantized() if isinstance(tensor, Quantized) else tensor
        half_a_step = expected[name].abs().max() / 127 / 2 if kind is Kind.Q5_1 else 0
        torch.testing.assert_close(meant, expected[name], rtol=1e-6, atol=float(half_a_step) * 1.01 + 1e-7)


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q5_0, Kind.Q8_0], ids=lambda kind: kind.name)
def test_any_block_means_what_dequantizing_gives(kind: Kind) -> None:
    """All integers, scales and minima: what our own rounding would never write."""
    blocks = random_blocks(kind, 16, np.random.default_rng(0))
    expected = torch.from_numpy(dequantize(blocks, kind)).view(8, -1)
    stored = quantized_from(blocks, kind, expected.shape)
    assert stored.bits == (4 if kind is Kind.Q4_K else 8)
    rounding = 2**-11 if kind is Kind.Q4_K else 1e-6  # of the products of scales, to fp16
    assert ((stored.dequantized() - expected).abs() <= rounding * (1 + expected.abs().max())).all()


def test_the_log_says_what_became_of_each_kind(tmp_path: Path) -> None:
    write_gguf(tiny_llama(), tmp_path / "tiny.gguf", Kind.Q5_1)
    with capture_logs() as lines:
        list(GGUFCheckpoint(tmp_path / "tiny.gguf").stored())
    assert [line["became"] for line in lines] == ["15 Q5_1 in 8 bits"]
