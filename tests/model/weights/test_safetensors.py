"""A folder written by transformers gives back the network's state dict, or says what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.model.weights.networks import expected_tensors, tiny_gpt2, tiny_llama
from tokenrelay.model.config import UnsupportedModelError
from tokenrelay.model.transformer.loading import load_transformer
from tokenrelay.model.transformer.transformer import Transformer
from tokenrelay.model.weights.checkpoint import open_checkpoint
from tokenrelay.model.weights.errors import CheckpointError
from tokenrelay.model.weights.safetensors import SafetensorsCheckpoint
from tokenrelay.model.weights.sources import resolve


@pytest.fixture(params=["one file", "shards"])
def llama_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path, max_shard_size="40KB" if request.param == "shards" else "1GB")
    return tmp_path


def test_llama_tensors_equal_the_state_dict(llama_folder: Path) -> None:
    found = dict(open_checkpoint(resolve(str(llama_folder))).tensors())
    expected = expected_tensors(tiny_llama())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_config_is_the_network_s(llama_folder: Path) -> None:
    (llama_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    config = SafetensorsCheckpoint(llama_folder).config()
    assert (config.hidden_size, config.num_layers, config.num_kv_heads, config.head_dim) == (64, 2, 2, 16)
    assert config.eos_token_ids == (2, 7)
    assert config.tie_word_embeddings


def test_tensors_come_in_the_type_asked_for(llama_folder: Path) -> None:
    assert {t.dtype for _, t in SafetensorsCheckpoint(llama_folder).tensors(torch.bfloat16)} == {torch.bfloat16}


def test_gpt2_is_the_same_network_with_the_language_model_s_prefix_or_without(tmp_path: Path) -> None:
    """Published files name the bare network."""
    model = tiny_gpt2()
    model.save_pretrained(tmp_path / "whole")
    model.transformer.save_pretrained(tmp_path / "bare")
    whole, bare = (network(SafetensorsCheckpoint(tmp_path / name)).state_dict() for name in ("whole", "bare"))
    assert all(torch.equal(whole[name], bare[name]) for name in whole)


def network(checkpoint: SafetensorsCheckpoint) -> Transformer:
    tensors = checkpoint.tensors()
    return load_transformer(
        checkpoint.config(),
        tensors,
        checkpoint.rules,
        max_model_len=16,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def test_missing_shard_is_named(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path, max_shard_size="40KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        SafetensorsCheckpoint(tmp_path)


def test_a_tensor_that_only_the_index_has_is_named(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path, max_shard_size="40KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="ghost"):
        list(SafetensorsCheckpoint(tmp_path).tensors())


@pytest.mark.parametrize("shard", ["../outside.safetensors", 3])
def test_an_index_may_not_leave_its_folder(shard: object, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(CheckpointError):
        SafetensorsCheckpoint(tmp_path)


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        list(SafetensorsCheckpoint(tmp_path).tensors())


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("{", CheckpointError),
        ("[]", CheckpointError),
        ('{"model_type": "llama"}', CheckpointError),
        ('{"model_type": "mamba"}', UnsupportedModelError),
        ('{"model_type": "gpt2", "n_embd": "x", "n_head": 2}', CheckpointError),
    ],
)
def test_bad_config_is_refused(content: str, error: type[ValueError], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(error):
        SafetensorsCheckpoint(tmp_path)
