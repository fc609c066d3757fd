"""What a network looks like and how the engine runs it.

Knows the names that checkpoints use (``config.json`` of transformers); knows no tensors. Both classes are
frozen: derived values are properties, and nothing is written back after construction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

DType = Literal["float32", "bfloat16", "float16"]


class UnsupportedModelError(ValueError):
    """The checkpoint describes a network that this server cannot run; the message names what and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and switches of one decoder. Sizes are counts of elements, not bytes."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm: Literal["rms", "layer"]
    norm_eps: float
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"]
    gated_mlp: bool
    positions: Literal["rotary", "learned"]
    rope_theta: float = 10_000.0
    attention_bias: bool = False  # on q, k, v
    output_bias: bool = False  # on the attention's output projection
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read a transformers ``config.json``.

        Raises:
            UnsupportedModelError: unknown architecture, or a switch that would change the result and is not built.
        """
        model_type = config.get("model_type")
        reader = _READERS.get(str(model_type))
        if reader is None:
            raise UnsupportedModelError(
                f"model_type {model_type!r} is not supported; known: {', '.join(sorted(_READERS))}"
            )
        return reader(config)


def _llama(config: Mapping[str, Any]) -> ModelConfig:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", None):
        raise UnsupportedModelError(f"rope scaling {rope_type!r} is not supported yet; only 'default' is")
    heads = config["num_attention_heads"]
    return ModelConfig(
        architecture="llama",
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        norm="rms",
        norm_eps=config.get("rms_norm_eps", 1e-6),
        activation=_activation(config.get("hidden_act", "silu")),
        gated_mlp=True,
        positions="rotary",
        rope_theta=rope.get("rope_theta") or config.get("rope_theta", 10_000.0),
        attention_bias=config.get("attention_bias", False),
        output_bias=config.get("attention_bias", False),
        mlp_bias=config.get("mlp_bias", False),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        eos_token_ids=_token_ids(config.get("eos_token_id")),
    )


def _gpt2(config: Mapping[str, Any]) -> ModelConfig:
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


_READERS = {"llama": _llama, "gpt2": _gpt2}

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


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How much the engine may hold and do per step."""

    block_size: int = 16  # tokens per KV block
    num_blocks: int = 0  # 0: as many as kv_cache_bytes holds
    kv_cache_bytes: int = 1 << 30
    max_num_seqs: int = 64  # requests computed in one step
    max_num_batched_tokens: int = 512  # token budget of one step: bounds the stall a long prompt causes others
    max_model_len: int = 0  # 0: the network's own limit
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}), or running requests could not all advance"
            )
