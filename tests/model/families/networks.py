"""A tiny random network of every family, by name and variant: what tests of loaders and devices go through.

Variants differ in what published checkpoints of the family differ in. Norms and biases are random too: ones and zeros
would hide mistakes. A name that begins with a ``model_type`` and a comma is a variant of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedConfig, PreTrainedModel

from tests.model.families.vanilla import VanillaTransformer, VanillaTransformerConfig

_WIDTH = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
_MULTI_HEAD = _WIDTH | {"intermediate_size": 96}
_GROUPED = _MULTI_HEAD | {"num_key_value_heads": 2}
_GPT = {"vocab_size": 128, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "eos_token_id": 2}
_WIDE_HEADS = _GROUPED | {"head_dim": 32}
_WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_EXPERTS = {"num_experts_per_tok": 2}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + i for i in range(8)],
}
_GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 4.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}


def _made(name: str, **config: Any) -> Callable[[], PreTrainedModel]:
    """Of the family whose classes begin with ``name``."""
    head = "LMHeadModel" if name in ("GPT2", "OpenAIGPT") else "ForCausalLM"
    configuration = {"Gemma3": "Gemma3Text"}.get(name, name)
    return lambda: _shaken(getattr(hf, name + head), getattr(hf, f"{configuration}Config")(**config))


def _vanilla(**config: Any) -> Callable[[], PreTrainedModel]:
    return lambda: _shaken(VanillaTransformer, VanillaTransformerConfig(**config))


def _gemma3_with_pictures() -> PreTrainedModel:
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text, vision = _WIDE_HEADS | _WINDOWS, size | {"image_size": 28, "patch_size": 14}
    config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, eos_token_id=2)
    return _shaken(hf.Gemma3ForConditionalGeneration, config)


def _shaken(network: Callable[[Any], PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    made: PreTrainedModel = network(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def tiny(name: str, **changes: Any) -> PreTrainedModel:
    """The network of this name, with other values in its configuration."""
    network = TINY[name]()
    fields = network.config.to_dict() | changes
    return _shaken(type(network), type(network.config)(**fields)) if changes else network


TINY: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": _made("GPT2", **_GPT),
    "gpt2, exact gelu": _made("GPT2", **_GPT, activation_function="gelu"),
    "llama": _made("Llama", **_GROUPED),
    "llama, tied": _made("Llama", **_GROUPED, tie_word_embeddings=True),
    "llama, biased": _made("Llama", **_GROUPED, attention_bias=True, mlp_bias=True),
    "llama, wide heads": _made("Llama", **_WIDE_HEADS, rope_theta=100_000.0),
    "mistral": _made("Mistral", **_GROUPED, sliding_window=16),
    "mistral, no window": _made("Mistral", **_GROUPED, sliding_window=None),
    "ministral": _made("Ministral", **_WIDE_HEADS, **_WINDOWS),
    "gpt_neox": _made("GPTNeoX", **_MULTI_HEAD, rope_parameters={"partial_rotary_factor": 0.25, "rope_theta": 1e4}),
    "gpt_neox, sequential": _made("GPTNeoX", **_MULTI_HEAD, use_parallel_residual=False),
    "gpt_neox, no bias": _made("GPTNeoX", **_MULTI_HEAD, attention_bias=False, tie_word_embeddings=True),
    "gptj": _made("GPTJ", **_GPT, rotary_dim=8),
    "opt": _made("OPT", **_WIDTH, ffn_dim=96),
    "opt, 350m's placement": _made("OPT", **_WIDTH, ffn_dim=96, do_layer_norm_before=False),
    "opt, no bias": _made("OPT", **_WIDTH, ffn_dim=96, enable_bias=False, tie_word_embeddings=False),
    "falcon, 7b": _made("Falcon", **_WIDTH, multi_query=True, parallel_attn=True, ffn_hidden_size=96),
    "falcon, 40b": _made("Falcon", **_WIDTH, new_decoder_architecture=True, num_kv_heads=2),
    "falcon, one norm": _made(
        "Falcon", **_WIDTH, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1
    ),
    "falcon, biased": _made(
        "Falcon", **_WIDTH, multi_query=False, parallel_attn=False, bias=True, tie_word_embeddings=False
    ),
    "phi": _made("Phi", **_MULTI_HEAD, partial_rotary_factor=0.5),
    "phi, grouped": _made("Phi", **_GROUPED),
    "phi3": _made("Phi3", **_GROUPED, sliding_window=16),
    "phi3, longrope": _made(
        "Phi3", **_GROUPED, rope_parameters=_LONGROPE, original_max_position_embeddings=64, tie_word_embeddings=True
    ),
    "phi3, part of a head": _made("Phi3", **_GROUPED, partial_rotary_factor=0.75),
    "stablelm": _made("StableLm", **_GROUPED),
    "stablelm, biased": _made("StableLm", **_GROUPED, use_qkv_bias=True, partial_rotary_factor=0.5),
    "stablelm, parallel": _made("StableLm", **_GROUPED, use_parallel_residual=True),
    "starcoder2": _made("Starcoder2", **_GROUPED, sliding_window=16),
    "starcoder2, no bias": _made("Starcoder2", **_GROUPED, use_bias=False, tie_word_embeddings=False),
    "qwen2": _made("Qwen2", **_GROUPED),
    "qwen2, windows": _made(
        "Qwen2", **_GROUPED, use_sliding_window=True, sliding_window=16, max_window_layers=1, tie_word_embeddings=True
    ),
    "qwen2_moe": _made(
        "Qwen2Moe",
        **_GROUPED,
        **_EXPERTS,
        num_experts=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
        mlp_only_layers=[1],
    ),
    "qwen3": _made("Qwen3", **_WIDE_HEADS),
    "qwen3, tied": _made("Qwen3", **_WIDE_HEADS, attention_bias=True, tie_word_embeddings=True),
    "qwen3_moe": _made(
        "Qwen3Moe",
        **_WIDE_HEADS,
        **_EXPERTS,
        num_experts=4,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        mlp_only_layers=[0],
    ),
    "qwen3_moe, weights as they are": _made(
        "Qwen3Moe", **_WIDE_HEADS, **_EXPERTS, num_experts=4, moe_intermediate_size=32, decoder_sparse_step=2
    ),
    "mixtral": _made("Mixtral", **_GROUPED, **_EXPERTS, num_local_experts=4),
    "olmo": _made("Olmo", **_GROUPED),
    "olmo2": _made("Olmo2", **_GROUPED),
    "olmo3": _made("Olmo3", **_GROUPED, **_WINDOWS),
    "olmoe": _made("Olmoe", **_GROUPED, **_EXPERTS, num_experts=4),
    "smollm3": _made("SmolLM3", **_GROUPED, no_rope_layers=[1, 0, 1]),
    "smollm3, windows": _made(
        "SmolLM3", **_GROUPED, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=16
    ),
    "granite": _made("Granite", **_GROUPED, **_GRANITE),
    "granite, tied and biased": _made(
        "Granite", **_GROUPED, **_GRANITE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "granitemoe": _made("GraniteMoe", **_GROUPED, **_GRANITE, **_EXPERTS, num_local_experts=4),
    "granitemoeshared": _made(
        "GraniteMoeShared", **_GROUPED, **_GRANITE, **_EXPERTS, num_local_experts=4, shared_intermediate_size=48
    ),
    "gemma": _made("Gemma", **_WIDE_HEADS),
    "gemma2": _made("Gemma2", **_WIDE_HEADS, **_WINDOWS, query_pre_attn_scalar=20, attn_logit_softcapping=2.0),
    "gemma3_text": _made("Gemma3", **_WIDE_HEADS, **_WINDOWS, query_pre_attn_scalar=20),
    "gemma3_text, stretched": _made(
        "Gemma3",
        **_WIDE_HEADS,
        **_WINDOWS,
        final_logit_softcapping=3.0,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": _PLAIN_ROPE,
        },
    ),
    "gemma3": _gemma3_with_pictures,
    "gpt_oss": _made("GptOss", **_WIDE_HEADS, **_EXPERTS, **_WINDOWS, num_local_experts=4),
    "cohere": _made("Cohere", **_GROUPED),
    "cohere2": _made("Cohere2", **_GROUPED, **_WINDOWS),
    "nemotron": _made("Nemotron", **_GROUPED),
    "arcee": _made("Arcee", **_GROUPED, mlp_bias=True),
    "seed_oss": _made("SeedOss", **_WIDE_HEADS, attention_out_bias=True),
    "ernie4_5": _made("Ernie4_5", **_WIDE_HEADS),
    "exaone4": _made("Exaone4", **_GROUPED, **_WINDOWS),
    "glm": _made("Glm", **_WIDE_HEADS),
    "glm4": _made("Glm4", **_WIDE_HEADS),
    "helium": _made("Helium", **_GROUPED, head_dim=16),
    "cwm": _made("Cwm", **_WIDE_HEADS, **_WINDOWS),
    "gpt_neo": _made(
        "GPTNeo",
        vocab_size=128,
        hidden_size=64,
        num_layers=3,
        num_heads=4,
        max_position_embeddings=128,
        attention_types=[[["global", "local"], 1], [["global"], 1]],
        window_size=16,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "openai-gpt": _made("OpenAIGPT", **_GPT),
    "gpt_bigcode": _made("GPTBigCode", **_GPT, bos_token_id=1),
    "gpt_bigcode, multi-head": _made("GPTBigCode", **_GPT, bos_token_id=1, multi_query=False),
    "vanilla-transformer": _vanilla(**_MULTI_HEAD),
    "vanilla-transformer, untied": _vanilla(**_MULTI_HEAD, tie_word_embeddings=False),
}
