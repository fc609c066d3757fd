"""What a network looks like and how the engine runs it.

Knows no file format (``hf_config`` and ``weights`` fill it in) and no tensors. All classes are frozen: derived values
are properties, and nothing is written back after construction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DType = Literal["float32", "bfloat16", "float16", "int8"]
MAX_STREAMING_LEN = 2**20  # tokens of one sequence when attention sinks let it outgrow the context


class UnsupportedModelError(ValueError):
    """The checkpoint describes a network that this server cannot run; the message names what and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary positions are stretched past the length a network was first trained on.

    The names are those of ``rope_parameters`` in transformers; ``transformer.rope`` has the formulas.
    """

    rope_type: Literal["linear", "dynamic", "yarn", "llama3", "longrope"]
    original_max_position_embeddings: int
    factor: float = 1.0
    attention_factor: float = 1.0  # on cosine and sine, so attention's logits carry its square: yarn, longrope
    beta_fast: float = 32.0  # yarn: a frequency that turns so often within the original length is kept,
    beta_slow: float = 1.0  # one that turns so rarely is divided by the factor, those between are mixed
    truncate: bool = True  # yarn: round these two bounds outwards to whole frequencies
    low_freq_factor: float = 1.0  # llama3: as beta_slow
    high_freq_factor: float = 4.0  # llama3: as beta_fast
    short_factor: tuple[float, ...] = ()  # longrope: one divisor per frequency, for max_model_len up to the original
    long_factor: tuple[float, ...] = ()  # longrope: and beyond it


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
    max_position_embeddings: int  # the longest sequence, with rope scaling applied
    norm: Literal["rms", "layer"]
    norm_eps: float
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"]
    gated_mlp: bool
    positions: Literal["rotary", "learned"]
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int = 0  # a token sees itself and so many - 1 before it, in every layer; 0: all of them
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

    @property
    def num_weights(self) -> int:
        """Of its matrices: biases and norms are too few to matter."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        positions = self.max_position_embeddings * self.hidden_size if self.positions == "learned" else 0
        attention = 2 * self.hidden_size * (self.q_size + self.kv_size)
        mlp = (3 if self.gated_mlp else 2) * self.hidden_size * self.intermediate_size
        return embeddings + positions + self.num_layers * (attention + mlp)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How much the engine may hold and do per step."""

    block_size: int = 16  # tokens per KV block
    num_blocks: int = 0  # 0: as many as kv_cache_bytes holds
    kv_cache_bytes: int = 1 << 30
    max_num_seqs: int = 64  # requests computed in one step
    max_num_batched_tokens: int = 512  # token budget of one step
    max_prefill_tokens_beside_decodes: int = 64  # of it, for prompts: bounds the stall they cause running streams
    num_speculative_tokens: int = 8  # most drafts verified per request and step; 0: none
    attention_sinks: int = 0  # StreamingLLM: so many first tokens stay visible while a sequence outgrows the context
    kv_cache_dtype: Literal["auto", "int8"] = "auto"  # auto: the weights'
    max_model_len: int = 0  # 0: the network's own limit
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", "max_prefill_tokens_beside_decodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}), or running requests could not all advance"
            )
