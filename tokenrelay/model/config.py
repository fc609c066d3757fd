"""What a network looks like and how the engine runs it.

Knows no file format (``families`` and ``weights`` fill it in) and no tensors. All classes are frozen: derived values
are properties, and nothing is written back after construction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DType = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["auto", "none", "int8", "int8-weight-only", "int4", "fp8"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_oai"]
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
class Experts:
    """A mixture of experts in the MLP's place (Shazeer et al. 2017; as in Mixtral, Jiang et al. 2024)."""

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int  # of one expert
    normalize_weights: bool = True  # softmax over the chosen experts alone, not over all
    router_bias: bool = False
    shared_intermediate_size: int = 0  # of an expert that every token goes through; 0: there is none
    shared_gate: bool = False  # its output is multiplied by a sigmoid of its own projection


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and switches of one decoder. Sizes are counts of elements, not bytes.

    A switch that is left out is as in Llama.
    """

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
    activation: Activation
    gated_mlp: bool
    positions: Literal["rotary", "learned", "sinusoidal", "none"]

    # pre: x + f(norm x); post: x + norm(f x); sandwich: x + norm(f(norm x)); after_sum: norm(x + f x)
    norm_placement: Literal["pre", "post", "sandwich", "after_sum"] = "pre"
    parallel_residual: bool = False  # x + attention(norm x) + mlp(norm x)
    shared_norm: bool = False  # one norm for both of these
    norm_weight: bool = True  # False: norms do not scale what they normalised
    norm_bias: bool = True  # of layer norms; rms norms have none
    final_norm: bool = True

    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rotary_dim: int = 0  # so many first elements of a head are rotated; 0: all
    local_rope_theta: float = 0.0  # in layers with a window, without scaling; 0: as in the others
    unrotated_layers: frozenset[int] = frozenset()

    sliding_window: int = 0  # a token sees itself and so many - 1 before it; 0: all of them
    full_attention_layers: frozenset[int] = frozenset()  # these see all, whatever the window
    qk_norm: Literal["", "head", "whole"] = ""  # before the rotation: each head by itself, or all heads as one vector
    attention_scale: float = 0.0  # of the logits; 0: head_dim ** -0.5
    attention_softcap: float = 0.0  # logits become cap * tanh(logits / cap); 0: they stay
    learned_sinks: bool = False  # one more logit per head takes part in the softmax, and has no value

    attention_bias: bool = False  # on q, k, v
    output_bias: bool = False  # on the attention's output projection
    mlp_bias: bool = False
    lm_head_bias: bool = False
    tie_word_embeddings: bool = False

    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP add
    logits_scale: float = 1.0  # a factor
    logits_softcap: float = 0.0

    experts: Experts | None = None
    dense_layers: frozenset[int] = frozenset()  # these have an MLP all the same
    eos_token_ids: tuple[int, ...] = ()

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def window(self, layer: int) -> int:
        """Of one layer; 0: it sees everything."""
        return 0 if layer in self.full_attention_layers else self.sliding_window

    def is_sparse(self, layer: int) -> bool:
        """Whether a mixture of experts takes the MLP's place in this layer."""
        return self.experts is not None and layer not in self.dense_layers

    @property
    def num_weights(self) -> int:
        """Of its matrices: biases and norms are too few to matter."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        positions = self.max_position_embeddings * self.hidden_size if self.positions == "learned" else 0
        attention = 2 * self.hidden_size * (self.q_size + self.kv_size)
        matrices = (3 if self.gated_mlp else 2) * self.hidden_size
        layers = sum(attention + matrices * self._mlp_width(layer) for layer in range(self.num_layers))
        return embeddings + positions + layers

    def _mlp_width(self, layer: int) -> int:
        if self.experts is None or layer in self.dense_layers:
            return self.intermediate_size
        return self.experts.num_experts * self.experts.intermediate_size + self.experts.shared_intermediate_size


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How much the engine may hold and do per step."""

    block_size: int = 16  # tokens per KV block; rounded up to what the device's attention reads
    num_blocks: int = 0  # 0: as many as kv_cache_bytes holds
    kv_cache_bytes: int = 0  # 0: 1 GiB, on CUDA what gpu_memory_utilization leaves
    gpu_memory_utilization: float = 0.9  # share of a GPU that weights, steps and the KV cache may take together
    enforce_eager: bool = False  # no CUDA graphs
    max_num_seqs: int = 64  # requests computed in one step
    max_num_batched_tokens: int = 512  # token budget of one step
    max_prefill_tokens_beside_decodes: int = 64  # of it, for prompts: bounds the stall they cause running streams
    num_speculative_tokens: int = 8  # most drafts verified per request and step; 0: none
    attention_sinks: int = 0  # StreamingLLM: so many first tokens stay visible while a sequence outgrows the context
    kv_cache_dtype: Literal["auto", "int8"] = "auto"  # auto: 16-bit integers on a CPU, else the weights'
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
