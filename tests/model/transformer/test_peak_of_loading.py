"""What loading takes is what the weights take, and little more: in few bits as in many."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.model.transformer import peak_of_loading
from tokenrelay.model.transformer.kernels import native

pytestmark = [
    pytest.mark.skipif(not native.is_available(), reason=native.why_unavailable() or "native library"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 MB in bf16, in many matrices, as in a large network."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=28,
        num_attention_heads=6,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("llama")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu").to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.uniform_(-0.1, 0.1)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "quantization", ["auto", "none", "int8", "int8-weight-only", pytest.param("int4", marks=pytest.mark.long)]
)
def test_peak_memory_is_that_of_the_weights(folder: Path, quantization: str) -> None:
    """And 20 %. These small matrices would leave holes in a heap that keeps what is freed."""
    command = [sys.executable, peak_of_loading.__file__, str(folder), quantization]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    weights, peak = int(printed[0]), int(printed[1])
    assert weights > 20_000_000
    assert weights < peak * 1.05, "the watch saw nothing"
    assert peak <= 1.2 * weights, f"{peak / 1e6:.0f} MB for {weights / 1e6:.0f} MB of weights"
