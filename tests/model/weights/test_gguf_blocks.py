"""Whole networks of quantized GGUF matrices: logits are transformers' with what the gguf package makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from tests.model.families.networks import tiny
from tests.model.families.running import logits
from tests.model.weights.gguf_blocks import SCALES, write_blocks
from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families import Rule
from tokenrelay.model.quantized import Quantized
from tokenrelay.model.transformer.loading import load_transformer
from tokenrelay.model.weights.gguf.checkpoint import GGUFCheckpoint

IDS = torch.randint(3, 128, (24,), generator=torch.Generator().manual_seed(1))
# Rows that divide into the longest blocks. Every expert is chosen: of eight bits' noise none may change the choice.
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64}
ALL_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 4}
NETWORKS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {},
    "mixtral": ALL_EXPERTS,
    "gemma": {},
    "gpt_oss": ALL_EXPERTS | {"layer_types": ["sliding_attention", "full_attention"]},
}
Q4_K_M = (Kind.Q4_K, Kind.Q6_K)  # one matrix of ours, of q, k and v, is then of several kinds
CASES = [
    *(("llama", [kind]) for kind in SCALES),
    *(("llama, tied", [kind]) for kind in (Kind.Q4_0, Kind.Q6_K)),
    *(("mixtral", [kind]) for kind in (Kind.Q8_0, Kind.Q4_K, Kind.Q6_K, Kind.MXFP4)),
    *(("gemma", [kind]) for kind in (Kind.Q4_1, Kind.Q5_K, Kind.IQ4_XS)),
    *((name, Q4_K_M) for name in ("llama", "mixtral", "gemma")),
    ("gpt_oss", [Kind.MXFP4, Kind.Q8_0]),
]


def described(case: str | Sequence[Kind]) -> str:
    return case if isinstance(case, str) else "+".join(kind.name for kind in case)


@pytest.mark.parametrize(("name", "kinds"), CASES, ids=described)
def test_blocks_of_any_bits_make_the_network_they_mean(name: str, kinds: Sequence[Kind], tmp_path: Path) -> None:
    """In few bits with the noise of 8-bit activations, and of 8 bits for groups whose own scales were of 16."""
    network = tiny(name, **WIDE | NETWORKS[name])
    checkpoint = GGUFCheckpoint(write_blocks(network, tmp_path / "tiny.gguf", kinds))
    expected = network(IDS.unsqueeze(0)).logits[0].detach()
    assert (run(checkpoint.config(), checkpoint.tensors(), checkpoint.rules) - expected).abs().max() <= 1e-4
    kept = run(checkpoint.config(), checkpoint.stored(), checkpoint.rules)
    assert (kept - expected).norm() <= 0.05 * expected.norm()


def test_experts_stay_in_few_bits(tmp_path: Path) -> None:
    """A stack of them in one tensor, as much as each in its own."""
    network = tiny("mixtral", **WIDE)
    checkpoint = GGUFCheckpoint(write_blocks(network, tmp_path / "tiny.gguf", Q4_K_M))
    bits = {name: tensor.bits for name, tensor in checkpoint.stored() if isinstance(tensor, Quantized)}
    assert {name for name in bits if "_exps" in name} == {
        f"blk.{layer}.ffn_{part}_exps.weight" for layer in (0, 1) for part in ("gate", "up", "down")
    }
    assert set(bits.values()) == {4, 8}


@torch.inference_mode()
def run(config: ModelConfig, tensors: Iterable[tuple[str, Tensor | Quantized]], rules: Sequence[Rule]) -> Tensor:
    """Logits of our network in fp32, but for what came in few bits."""
    cpu = torch.device("cpu")
    return logits(
        config, load_transformer(config, tensors, rules, max_model_len=64, dtype=torch.float32, device=cpu), IDS
    )
