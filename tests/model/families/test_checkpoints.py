"""Tensors that do not fit their configuration are refused by name; both names of experts are known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.model.families.networks import TINY
from tests.model.families.running import CPU, load, logits
from tokenrelay.model.transformer.loading import load_transformer
from tokenrelay.model.transformer.placing import WeightsError
from tokenrelay.model.transformer.transformer import Transformer
from tokenrelay.model.weights.safetensors import SafetensorsCheckpoint


def saved(name: str, folder: Path) -> tuple[SafetensorsCheckpoint, dict[str, Tensor]]:
    TINY[name]().save_pretrained(folder)
    checkpoint = SafetensorsCheckpoint(folder)
    return checkpoint, dict(checkpoint.tensors(torch.float32))


def filled(checkpoint: SafetensorsCheckpoint, tensors: Mapping[str, Tensor]) -> Transformer:
    config, rules = checkpoint.config(), checkpoint.rules
    return load_transformer(config, tensors.items(), rules, max_model_len=128, dtype=torch.float32, device=CPU)


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint, tensors = saved("llama", tmp_path)
    name = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(WeightsError, match=r"does not fill layers\.1\.attention\.qkv_proj\.weight \(k\) \(1 in all\)"):
        filled(checkpoint, {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(WeightsError, match=r"norm\.weight \(2 in all\)"):
        filled(checkpoint, {n: t for n, t in tensors.items() if n not in ("model.norm.weight", name)})
    with pytest.raises(WeightsError, match="surprise"):
        filled(checkpoint, {**tensors, "model.surprise.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"k_proj.*\[3, 64\], expected \[32, 64\]"):
        filled(checkpoint, {**tensors, name: torch.zeros(3, 64)})


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.weight", (191, 64)),
        ("gptj", "transformer.h.0.attn.q_proj.weight", (63, 64)),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj", (4, 64, 191)),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj", (4,)),
    ],
)
def test_what_cannot_be_laid_out_is_refused_by_name(
    family: str, name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    checkpoint, tensors = saved(family, tmp_path)
    assert name in tensors
    with pytest.raises(WeightsError, match=name):
        filled(checkpoint, {**tensors, name: torch.zeros(shape)})


def test_norms_without_weights_in_their_family_may_not_bring_any(tmp_path: Path) -> None:
    checkpoint, tensors = saved("olmo", tmp_path)
    with pytest.raises(WeightsError, match=r"model\.norm\.weight"):
        filled(checkpoint, {**tensors, "model.norm.weight": torch.ones(64)})


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
@torch.inference_mode()
def test_experts_stored_as_one_tensor_are_those_stored_one_by_one(family: str, tmp_path: Path) -> None:
    """Hubs have the latter; transformers 5 holds the former in memory and may save it."""
    checkpoint, tensors = saved(family, tmp_path)
    config, one_by_one = load(tmp_path)
    fused = filled(checkpoint, stacked(tensors))
    ids = torch.arange(3, 40)
    assert torch.equal(logits(config, fused, ids), logits(config, one_by_one, ids))


def stacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """[E, 2I, C] and [E, C, I] under transformers' names in memory."""
    up, gate, down = (
        ("w3", "w1", "w2") if any("w1" in name for name in tensors) else ("up_proj", "gate_proj", "down_proj")
    )
    others = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    prefixes = {name.split(".experts.")[0] + ".experts." for name in tensors if ".experts." in name}
    assert prefixes
    for prefix in prefixes:
        gates, ups, downs = (
            torch.stack([tensors[f"{prefix}{expert}.{part}.weight"] for expert in range(4)])
            for part in (gate, up, down)
        )
        others |= {f"{prefix}gate_up_proj": torch.cat([gates, ups], dim=1), f"{prefix}down_proj": downs}
    return others
