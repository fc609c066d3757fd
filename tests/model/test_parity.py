"""Our network equals transformers' on tiny random configurations: loader and mathematics tested together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.model.generation import generate
from tokenrelay.model.config import EngineConfig, ModelConfig
from tokenrelay.model.engine.engine import Engine
from tokenrelay.model.engine.request import Request
from tokenrelay.model.sampling_params import SamplingParams
from tokenrelay.model.transformer.attention import AttentionMetadata
from tokenrelay.model.transformer.kv_cache import allocate_kv_cache
from tokenrelay.model.transformer.loading import WeightsError, load_transformer
from tokenrelay.model.transformer.transformer import Transformer
from tokenrelay.model.weights.safetensors import SafetensorsCheckpoint

CPU = torch.device("cpu")
BLOCK = 16

LLAMA = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 128, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "eos_token_id": 2}

FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "llama, biased": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True)),
    "llama, wide heads": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, head_dim=32, rope_theta=100_000.0)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "gpt2, exact gelu": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, activation_function="gelu")),
}


@pytest.fixture(params=FAMILIES)
def theirs(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = FAMILIES[request.param]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start as ones and zeros: hide no mistake
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    return model


def ours(folder: Path) -> tuple[ModelConfig, Transformer]:
    checkpoint = SafetensorsCheckpoint(folder)
    config = checkpoint.config()
    tensors = checkpoint.tensors(torch.float32)
    return config, load_transformer(config, tensors, max_model_len=128, dtype=torch.float32, device=CPU)


def metadata(num_computed: int, num_tokens: int, blocks: list[int]) -> AttentionMetadata:
    positions = torch.arange(num_computed, num_computed + num_tokens)
    table = torch.tensor(blocks)
    return AttentionMetadata(
        table[positions // BLOCK] * BLOCK + positions % BLOCK,
        table.int().unsqueeze(0),
        torch.tensor([0, num_tokens], dtype=torch.int32),
        torch.tensor([num_computed + num_tokens], dtype=torch.int32),
    )


@torch.inference_mode()
def test_logits_equal_in_chunks_and_paged_decode(theirs: PreTrainedModel, tmp_path: Path) -> None:
    config, model = ours(tmp_path)
    ids = torch.randint(3, 128, (60,))
    expected = theirs(ids.unsqueeze(0)).logits[0]
    cache = allocate_kv_cache(config, 8, BLOCK, torch.float32, CPU)
    chunks = [(0, 33), (33, 20), *((position, 1) for position in range(53, 60))]
    logits = [
        model.compute_logits(
            model(ids[start : start + n], torch.arange(start, start + n), cache, metadata(start, n, [5, 0, 7, 2]))
        )
        for start, n in chunks
    ]
    assert (torch.cat(logits) - expected).abs().max() <= 1e-4


@torch.inference_mode()
def test_greedy_ids_equal_for_64_steps(theirs: PreTrainedModel, tmp_path: Path) -> None:
    engine = Engine.from_checkpoint(
        SafetensorsCheckpoint(tmp_path), EngineConfig(num_blocks=32), dtype=torch.float32, device=CPU
    )
    prompt = list(range(3, 20))
    params = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert generate(engine, [Request("a", prompt, params)])["a"] == expected[0, len(prompt) :].tolist()


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    FAMILIES["llama"]().save_pretrained(tmp_path)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    config, tensors = checkpoint.config(), dict(checkpoint.tensors(torch.float32))
    name = "model.layers.1.self_attn.k_proj.weight"

    def load(changed: dict[str, torch.Tensor]) -> None:
        load_transformer(config, changed.items(), max_model_len=64, dtype=torch.float32, device=CPU)

    with pytest.raises(WeightsError, match=r"layers\.1\.attention\.qkv_proj\.weight"):
        load({n: t for n, t in tensors.items() if n != name})
    with pytest.raises(WeightsError, match="surprise"):
        load({**tensors, "model.surprise.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"k_proj.*\[3, 64\], expected \[16, 64\]"):
        load({**tensors, name: torch.zeros(3, 64)})
