"""Our network equals transformers' on tiny random configurations: loader and mathematics tested together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

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

ORIGINAL = {"original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    **ORIGINAL,
}


def llama(rope: dict[str, Any], max_position_embeddings: int = 128) -> PreTrainedModel:
    size = LLAMA | {"max_position_embeddings": max_position_embeddings}
    return LlamaForCausalLM(LlamaConfig(**size, rope_parameters=dict(rope)))


FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "llama, biased": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True)),
    "llama, wide heads": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, head_dim=32, rope_theta=100_000.0)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "gpt2, exact gelu": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, activation_function="gelu")),
}
VARIANTS = {  # for the logits alone: a longer text would say no more
    "llama, linear": lambda: llama({"rope_type": "linear", "factor": 4.0}, 32),
    "llama, yarn": lambda: llama({"rope_type": "yarn", "factor": 4.0, **ORIGINAL}),
    "llama, llama3": lambda: llama(LLAMA3),
    "mistral, no window": lambda: MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=None)),
}


@pytest.fixture(params=FAMILIES)
def theirs(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    return saved((FAMILIES | VARIANTS)[request.param], tmp_path)


def saved(make: Callable[[], PreTrainedModel], folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start as ones and zeros: hide no mistake
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def ours(folder: Path, max_model_len: int = 128) -> tuple[ModelConfig, Transformer]:
    checkpoint = SafetensorsCheckpoint(folder)
    config = checkpoint.config()
    tensors = checkpoint.tensors(torch.float32)
    rules = checkpoint.rules
    return config, load_transformer(
        config, tensors, rules, max_model_len=max_model_len, dtype=torch.float32, device=CPU
    )


def metadata(num_computed: int, num_tokens: int, blocks: list[int]) -> AttentionMetadata:
    positions = torch.arange(num_computed, num_computed + num_tokens)
    table = torch.tensor(blocks)
    return AttentionMetadata(
        table[positions // BLOCK] * BLOCK + positions % BLOCK,
        table.int().unsqueeze(0),
        torch.tensor([0, num_tokens], dtype=torch.int32),
        torch.tensor([num_computed + num_tokens], dtype=torch.int32),
    )


@pytest.mark.parametrize("theirs", FAMILIES | VARIANTS, indirect=True)
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


@pytest.mark.parametrize(
    ("rope", "max_position_embeddings", "num_tokens", "max_model_len"),
    [
        ({"rope_type": "dynamic", "factor": 4.0}, 32, 30, 32),
        ({"rope_type": "dynamic", "factor": 4.0}, 32, 60, 60),
        (LONGROPE, 128, 30, 32),
        (LONGROPE, 128, 60, 128),
    ],
    ids=["dynamic within", "dynamic beyond", "longrope within", "longrope beyond"],
)
@torch.inference_mode()
def test_scaling_by_length_is_transformers_for_a_prompt_of_the_server_s_length(
    rope: dict[str, Any], max_position_embeddings: int, num_tokens: int, max_model_len: int, tmp_path: Path
) -> None:
    """For other lengths the two differ on purpose: transformers changes frequencies while a sequence grows."""
    theirs = saved(lambda: llama(rope, max_position_embeddings), tmp_path)
    config, model = ours(tmp_path, max_model_len)
    ids = torch.randint(3, 128, (num_tokens,))
    cache = allocate_kv_cache(config, 8, BLOCK, torch.float32, CPU)
    hidden = model(ids, torch.arange(num_tokens), cache, metadata(0, num_tokens, [5, 0, 7, 2]))
    assert (model.compute_logits(hidden) - theirs(ids.unsqueeze(0)).logits[0]).abs().max() <= 1e-4


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
        load_transformer(config, changed.items(), checkpoint.rules, max_model_len=64, dtype=torch.float32, device=CPU)

    with pytest.raises(WeightsError, match=r"layers\.1\.attention\.qkv_proj\.weight"):
        load({n: t for n, t in tensors.items() if n != name})
    with pytest.raises(WeightsError, match="surprise"):
        load({**tensors, "model.surprise.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"k_proj.*\[3, 64\], expected \[16, 64\]"):
        load({**tensors, name: torch.zeros(3, 64)})
