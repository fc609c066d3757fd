"""ModelConfig from the keys of a transformers ``config.json``. No torch.

Every key that would change the result and is not built is refused by name. Checkpoints of other formats are renamed to
these keys, so that what is supported is decided here alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from tokenrelay.model.config import ModelConfig, UnsupportedModelError
from tokenrelay.model.hf_rope import max_position_embeddings, read_rope_scaling, rope_parameters

Config = Mapping[str, Any]


def read_hf_config(config: Config) -> ModelConfig:
    """The network that a ``config.json`` describes.

    Raises:
        UnsupportedModelError: unknown ``model_type``, or a switch that would change the result and is not built.
        KeyError, TypeError, AttributeError, ArithmeticError: a key is missing, or its value is of the wrong kind.
    """
    model_type = config.get("model_type")
    reader = _READERS.get(str(model_type))
    if reader is None:
        raise UnsupportedModelError(f"model_type {model_type!r} is not supported; known: {', '.join(sorted(_READERS))}")
    return reader(config)


def _llama(config: Config) -> ModelConfig:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = rope_parameters(config, head_dim)
    rope_scaling = read_rope_scaling(rope)
    return ModelConfig(
        architecture="llama",
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings(rope, rope_scaling),
        norm="rms",
        norm_eps=config.get("rms_norm_eps", 1e-6),
        activation=_activation(config.get("hidden_act", "silu")),
        gated_mlp=True,
        positions="rotary",
        rope_theta=rope["rope_theta"],
        rope_scaling=rope_scaling,
        attention_bias=config.get("attention_bias", False),
        output_bias=config.get("attention_bias", False),
        mlp_bias=config.get("mlp_bias", False),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        eos_token_ids=_token_ids(config.get("eos_token_id")),
    )


def _mistral(config: Config) -> ModelConfig:
    """Llama's network and tensors, with a window; what the file leaves out has transformers' values for Mistral."""
    stated = {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096} | dict(config)
    window = stated["sliding_window"] or 0
    if type(window) is not int or window < 0:
        raise UnsupportedModelError(f"sliding_window must be null or a number of tokens, not {window!r}")
    return replace(_llama(stated), sliding_window=window)


def _gpt2(config: Config) -> ModelConfig:
    for switch in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        if config.get(switch):
            raise UnsupportedModelError(f"gpt2 with {switch}=true is not supported")
    if not config.get("scale_attn_weights", True):
        raise UnsupportedModelError("gpt2 with scale_attn_weights=false is not supported")
    hidden, heads = config["n_embd"], config["n_head"]
    return ModelConfig(
        architecture="gpt2",
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        intermediate_size=config.get("n_inner") or 4 * hidden,
        num_layers=config["n_layer"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=config["n_positions"],
        norm="layer",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        activation=_activation(config.get("activation_function", "gelu_new")),
        gated_mlp=False,
        positions="learned",
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        tie_word_embeddings=config.get("tie_word_embeddings", True),
        eos_token_ids=_token_ids(config.get("eos_token_id")),
    )


_READERS = {"llama": _llama, "mistral": _mistral, "gpt2": _gpt2}


_ACTIVATIONS: dict[str, Literal["silu", "gelu", "gelu_tanh", "relu"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def _activation(name: str) -> Literal["silu", "gelu", "gelu_tanh", "relu"]:
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(f"activation {name!r} is not supported; known: {', '.join(sorted(_ACTIVATIONS))}")
    return _ACTIVATIONS[name]


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
