"""A model's description is read from its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.model.weights.networks import tiny_llama
from tokenrelay.model.weights import describe, read_model_config, resolve


def test_of_a_gguf_file(smollm2_path: Path) -> None:
    source = resolve(str(smollm2_path))
    described = describe(source, read_model_config(source))
    assert (described.file_format, described.family, described.weight_type) == ("gguf", "llama", "Q4_1")
    assert (described.num_parameters, described.size) == (134_515_008, smollm2_path.stat().st_size)


@pytest.mark.parametrize("tied", [False, True])
def test_of_a_folder(tmp_path: Path, tied: bool) -> None:
    network = tiny_llama(tied)
    network.save_pretrained(tmp_path)
    described_config = json.loads((tmp_path / "config.json").read_text())
    source = resolve(str(tmp_path))
    described = describe(source, read_model_config(source))
    norms = (2 * 2 + 1) * 64
    assert described.num_parameters == sum(weight.numel() for weight in network.parameters()) - norms
    assert described.weight_type == {"float32": "F32"}[described_config["dtype"]]
    assert (described.file_format, described.family) == ("safetensors", "llama")
    assert described.size == (tmp_path / "model.safetensors").stat().st_size
