"""Gemma 1, 2 and 3 (text): wide heads, scaled embeddings, norms whose weights are stored less 1. (Gemma Team 2024)

Files of the models that see pictures hold the text model under ``text_config``; their other tensors are passed over.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families import llama
from tokenrelay.model.families.family import Config, Rule, activation, refuse, stated
from tokenrelay.model.families.layer_types import read_windows
from tokenrelay.model.families.rope_parameters import by_layer_type


def _less_one(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return tuple(rule._replace(layout="plus_one") for rule in rules)


RULES = llama.EMBEDDINGS + _less_one(llama.FINAL_NORM + llama.NORMS) + llama.ATTENTION + llama.MLP
_SANDWICH = _less_one(
    (
        *llama.FINAL_NORM,
        Rule(llama.LAYER + r"input_layernorm\.(weight)", r"layers.\1.attention_norm.\2"),
        Rule(llama.LAYER + r"post_attention_layernorm\.(weight)", r"layers.\1.attention_post_norm.\2"),
        Rule(llama.LAYER + r"pre_feedforward_layernorm\.(weight)", r"layers.\1.mlp_norm.\2"),
        Rule(llama.LAYER + r"post_feedforward_layernorm\.(weight)", r"layers.\1.mlp_post_norm.\2"),
        *llama.QK_NORM,
    )
)
GEMMA2_RULES = llama.EMBEDDINGS + _SANDWICH + llama.ATTENTION + llama.MLP


def _under_language_model(rule: Rule) -> Rule:
    anywhere = r"(?:language_model\.)?model\.(?:language_model\.)?"
    return rule._replace(
        pattern=rule.pattern.replace(r"model\.", anywhere, 1).replace("lm_head", r"(?:language_model\.)?lm_head")
    )


GEMMA3_RULES = (
    *(_under_language_model(rule) for rule in GEMMA2_RULES),
    Rule(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\..*", ""),
)


def read(config: Config) -> ModelConfig:
    """Gemma 1; the others begin with it. ``hidden_act`` "gelu" means the tanh approximation."""
    refuse(config, "use_bidirectional_attention")
    full = stated(config, head_dim=256, max_position_embeddings=8192, rms_norm_eps=1e-6, tie_word_embeddings=True)
    given = full.get("hidden_activation") or full.get("hidden_act") or "gelu_pytorch_tanh"
    name = "gelu_pytorch_tanh" if given == "gelu" and full["model_type"] == "gemma" else given
    plain: dict[str, Any] = {"mlp_bias": False, "hidden_act": name}
    return replace(llama.read(full | plain), activation=activation(name), embedding_scale=full["hidden_size"] ** 0.5)


def read_gemma2(config: Config) -> ModelConfig:
    """Norms on both sides, capped logits, a window in every other layer."""
    full = stated(config, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, sliding_window=4096)
    return _sandwich(full, period=2)


def read_gemma3(config: Config) -> ModelConfig:
    """Norms on queries and keys instead of the caps; windowed layers have a theta of their own."""
    text = dict(config.get("text_config") or config) | {"model_type": config["model_type"]}
    if "text_config" in config:
        text = stated(text, **{key: config[key] for key in ("eos_token_id",) if key in config})
    full = stated(
        text,
        vocab_size=262_208,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=131_072,
        sliding_window=4096,
    )
    flat, local_theta = by_layer_type(full, theta=1e6, local_theta=10_000.0)
    period = full.get("sliding_window_pattern") or full.get("_sliding_window_pattern") or 6
    return replace(_sandwich(flat, period), qk_norm="head", local_rope_theta=local_theta)


def _sandwich(config: Config, period: int) -> ModelConfig:
    scalar = config.get("query_pre_attn_scalar", 256)
    return replace(
        read(config),
        norm_placement="sandwich",
        attention_scale=scalar**-0.5,
        attention_softcap=config.get("attn_logit_softcapping") or 0.0,
        logits_softcap=config.get("final_logit_softcapping") or 0.0,
        **read_windows(config, lambda layer: (layer + 1) % period != 0),
    )
