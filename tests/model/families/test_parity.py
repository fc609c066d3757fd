"""Every family equals transformers on tiny random networks: reader, names, loader and mathematics tested together."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import PreTrainedModel

from tests.model.families.networks import TINY
from tests.model.families.running import CPU, load, logits
from tests.model.generation import generate
from tokenrelay.model.config import EngineConfig
from tokenrelay.model.engine.engine import Engine
from tokenrelay.model.engine.request import Request
from tokenrelay.model.families import FAMILIES
from tokenrelay.model.sampling_params import SamplingParams
from tokenrelay.model.weights.safetensors import SafetensorsCheckpoint


class Saved(NamedTuple):
    """One of transformers' networks, and the folder that it saved itself to."""

    network: PreTrainedModel
    folder: Path


@pytest.fixture(scope="module", params=TINY)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    network, folder = TINY[request.param](), tmp_path_factory.mktemp("checkpoint")
    network.save_pretrained(folder)
    return Saved(network, folder)


def test_every_family_has_a_tiny_network() -> None:
    assert {name.split(",")[0] for name in TINY} == FAMILIES.keys()


@torch.inference_mode()
def test_logits_equal_in_chunks_and_paged_decode(saved: Saved) -> None:
    config, ours = load(saved.folder)
    ids = torch.randint(3, 128, (80,), generator=torch.Generator().manual_seed(1))
    expected = saved.network(ids.unsqueeze(0)).logits[0]
    looser = config.experts or config.attention_softcap or config.logits_softcap
    assert (logits(config, ours, ids, prefilled=70) - expected).abs().max() <= (1e-3 if looser else 1e-4)


@torch.inference_mode()
def test_greedy_ids_equal_for_64_steps(saved: Saved) -> None:
    """Transformers reads our text and at each of its places would have written the same token."""
    checkpoint = SafetensorsCheckpoint(saved.folder)
    engine = Engine.from_checkpoint(checkpoint, EngineConfig(num_blocks=32), dtype=torch.float32, device=CPU)
    prompt = list(range(3, 20))
    params = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)
    written = generate(engine, [Request("a", prompt, params)])["a"]
    theirs = saved.network(torch.tensor([prompt + written])).logits[0].argmax(dim=1).tolist()
    assert written == theirs[len(prompt) - 1 : -1]
