"""What config.json may say: rope scaling in either spelling, lengths, windows, and refusals by name."""

from __future__ import annotations

from typing import Any

import pytest

from tokenrelay.model.config import ModelConfig, RopeScaling, UnsupportedModelError
from tokenrelay.model.families import read_hf_config

LLAMA = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
}
EVERY = {
    name: LLAMA | {"model_type": name}
    for name in ("cohere", "gemma", "gemma2", "gemma3_text", "olmo", "olmoe", "phi", "qwen2", "qwen3_moe", "stablelm")
}
GPT_OSS = LLAMA | {"model_type": "gpt_oss", "num_local_experts": 4}
OPT = LLAMA | {"model_type": "opt", "ffn_dim": 32}
FALCON = LLAMA | {"model_type": "falcon"}
GPTJ = {"model_type": "gptj", "vocab_size": 8, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
FACTORS = [1.0, 2.0, 3.0, 4.0]
LONGROPE = {"type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS}


def read(**changes: Any) -> ModelConfig:
    return read_hf_config(LLAMA | changes)


def scaling(**changes: Any) -> RopeScaling:
    found = read(**changes).rope_scaling
    assert found is not None
    return found


def test_the_older_spelling_is_the_newer_one() -> None:
    newer = read(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6})
    assert read(rope_scaling={"type": "linear", "factor": 2}, rope_theta=1e6) == newer
    assert read(rope_scaling={"rope_type": "linear", "type": "dynamic", "factor": 2.0}, rope_theta=1e6) == newer


@pytest.mark.parametrize("rope", [None, {}, {"rope_type": "default"}, {"rope_type": "default", "rope_theta": 500.0}])
def test_no_scaling(rope: dict[str, Any] | None) -> None:
    config = read(rope_parameters=rope)
    assert config.rope_scaling is None
    assert config.rope_theta == (rope or {}).get("rope_theta", 10_000.0)


def test_su_is_the_first_name_of_longrope() -> None:
    phi = {"original_max_position_embeddings": 1024, "max_position_embeddings": 4096}
    assert scaling(rope_scaling=LONGROPE | {"type": "su"}, **phi) == scaling(rope_scaling=LONGROPE, **phi)
    assert scaling(rope_scaling=LONGROPE, **phi).attention_factor == pytest.approx(1.0954, abs=1e-4)


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"type": "linear", "factor": 4.0}, 16384),  # Vicuna 16k keeps the original length in the key
        ({"type": "linear", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
        ({"type": "dynamic", "factor": 2.0}, 8192),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),  # Qwen 2.5
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),  # already stretched
        ({"type": "yarn", "original_max_position_embeddings": 1024}, 4096),  # the factor follows from the lengths
        ({"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 4096),
        (LONGROPE | {"original_max_position_embeddings": 1024}, 4096),
    ],
)
def test_the_longest_sequence(rope: dict[str, Any], longest: int) -> None:
    assert read(rope_scaling=rope).max_position_embeddings == longest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "'mrope'.*default, dynamic, linear, llama3, longr"),
        ({"rope_scaling": {"type": "dynamic", "alpha": 1000.0}}, "alpha"),
        ({"rope_scaling": {"type": "linear"}}, "factor must be a positive number, not None"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor must be a positive number, not -1"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "factor.*True"),
        ({"rope_scaling": LONGROPE | {"long_factor": [1.0]}}, "long_factor must be 4 numbers, not 1"),
        ({"rope_scaling": LONGROPE | {"short_factor": None}}, "short_factor must be 4 numbers, not None"),
        ({"rope_scaling": LONGROPE | {"short_mscale": 1.2}}, "short_mscale"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            r"high_freq_factor 4\.0 must exceed",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}, "original_max_position_embeddings": -1}, "not -1"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor 0\.5"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0\.5"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"max_position_embeddings": "4k"}, "max_position_embeddings.*'4k'"),
        ({"model_type": "mistral", "sliding_window": -1}, "sliding_window.*-1"),
        ({"model_type": "mamba"}, "'mamba'.*known: arcee, .*gpt2, .*vanilla-transformer"),
    ],
)
def test_what_is_not_built_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read(**changes)


@pytest.mark.parametrize(
    ("stated", "window"), [({"sliding_window": 512}, 512), ({"sliding_window": None}, 0), ({}, 4096)]
)
def test_mistral_is_llama_with_a_window(stated: dict[str, Any], window: int) -> None:
    config = read(model_type="mistral", **stated)
    assert config.sliding_window == window


def test_llama_has_no_window_whatever_its_file_says() -> None:
    assert read(sliding_window=512).sliding_window == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EVERY["cohere"] | {"use_qk_norm": True}, "cohere with use_qk_norm=True"),
        (EVERY["gemma"] | {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (EVERY["olmo"] | {"clip_qkv": 8.0}, r"olmo with clip_qkv=8\.0"),
        (EVERY["olmoe"] | {"clip_qkv": 8.0}, r"olmoe with clip_qkv=8\.0"),
        (EVERY["phi"] | {"qk_layernorm": True}, "phi with qk_layernorm=True"),
        (EVERY["stablelm"] | {"qk_layernorm": True}, "stablelm with qk_layernorm=True"),
        (EVERY["stablelm"] | {"partial_rotary_factor": 0.45}, r"partial_rotary_factor 0\.45 rotates 3"),
        (FALCON | {"alibi": True}, "falcon with alibi=True"),
        (OPT | {"word_embed_proj_dim": 8}, r"word_embed_proj_dim=8.*hidden_size \(16\)"),
        (GPT_OSS | {"swiglu_limit": 5.0}, "swiglu_limit=7"),
        (GPTJ | {"rotary_dim": None}, "rotary_dim=None"),
        (EVERY["gemma2"] | {"layer_types": ["chunked_attention"]}, "gemma2.*chunked_attention"),
        (EVERY["gemma2"] | {"layer_types": ["full_attention"] * 2}, "2 layers, the network has 1"),
        (
            EVERY["gemma3_text"] | {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "sliding_attention with 'linear'",
        ),
    ],
)
def test_switches_of_a_family_that_are_not_built_are_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read_hf_config(config)


def test_gemma_3_with_pictures_holds_its_text_model_under_a_key_of_its_own() -> None:
    inner = {key: LLAMA[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    text = inner | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window": 1024}
    config = read_hf_config({"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": text})
    assert (config.vocab_size, config.num_heads, config.num_kv_heads, config.head_dim) == (262_208, 8, 4, 256)
    assert (config.rope_theta, config.local_rope_theta) == (1e6, 10_000.0)
    assert config.rope_scaling is not None
    assert config.rope_scaling.factor == 8.0
    assert config.sliding_window == 1024
    assert config.eos_token_ids == (1, 106)
    assert config.tie_word_embeddings


def test_qwen_states_a_window_that_it_does_not_use() -> None:
    assert read_hf_config(EVERY["qwen2"] | {"sliding_window": 512}).sliding_window == 0


@pytest.mark.parametrize(("key", "count"), [("num_experts", 8), ("num_local_experts", 4)])
def test_the_number_of_experts_has_two_names(key: str, count: int) -> None:
    experts = read_hf_config(EVERY["qwen3_moe"] | {key: count}).experts
    assert experts is not None
    assert experts.num_experts == count


def test_gpt_neox_before_transformers_5_has_other_names_for_its_positions() -> None:
    config = read_hf_config(LLAMA | {"model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 500})
    assert (config.rotary_dim, config.rope_theta) == (4, 500.0)
