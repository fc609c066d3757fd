"""A model in several files is the model in one; parts that do not belong together are refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter

from tests.model.weights.gguf_writer import gguf_tensors, write_metadata
from tests.model.weights.networks import tiny_llama
from tokenrelay.model.weights import describe, resolve
from tokenrelay.model.weights.errors import CheckpointError
from tokenrelay.model.weights.gguf.checkpoint import GGUFCheckpoint


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Written by the gguf package, so many tensors per file."""
    network = tiny_llama()
    writer = GGUFWriter(tmp_path / "tiny.gguf", "llama", split_max_tensors=7)
    write_metadata(writer, network.config)
    for name, values in gguf_tensors(network):
        writer.add_tensor(name, values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(tmp_path.glob("tiny-*.gguf"))


@pytest.mark.parametrize("opened", [0, 1, -1])
def test_all_tensors_are_found_whichever_part_is_named(opened: int, parts: list[Path]) -> None:
    expected = dict(gguf_tensors(tiny_llama()))
    assert len(parts) > 2
    found = dict(GGUFCheckpoint(parts[opened]).tensors())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], values) for name, values in expected.items())


def test_the_description_counts_all_parts(parts: list[Path]) -> None:
    source = resolve(str(parts[0]))
    described = describe(source, GGUFCheckpoint(parts[0]).config())
    assert described.size == sum(part.stat().st_size for part in parts)
    assert described.num_parameters == sum(values.numel() for _, values in gguf_tensors(tiny_llama()))


def test_a_missing_part_is_named(parts: list[Path]) -> None:
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=parts[1].name):
        GGUFCheckpoint(parts[0])


def test_a_part_under_another_s_name_is_refused(parts: list[Path]) -> None:
    shutil.copy(parts[1], parts[2])
    with pytest.raises(CheckpointError, match=rf"{parts[2].name}.*part 1 \(from 0\)"):
        GGUFCheckpoint(parts[0])


def test_a_part_under_a_name_of_its_own_is_refused(parts: list[Path]) -> None:
    renamed = parts[0].rename(parts[0].with_name("model.gguf"))
    with pytest.raises(CheckpointError, match="its name must end in"):
        GGUFCheckpoint(renamed)


def test_a_tensor_in_two_parts_is_refused(parts: list[Path]) -> None:
    stem = b"blk.1.attn_norm.weight"
    where = next(part for part in parts if stem in part.read_bytes())
    other = next(part for part in parts if part != where and b"blk.0.attn_norm.weight" in part.read_bytes())
    other.write_bytes(other.read_bytes().replace(b"blk.0.attn_norm.weight", stem))
    with pytest.raises(CheckpointError, match=r"blk\.1\.attn_norm\.weight.*another part"):
        GGUFCheckpoint(parts[0])
