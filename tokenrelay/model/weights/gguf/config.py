"""ModelConfig from the metadata of a GGUF file, its tensors' names and shapes, and what llama.cpp knows besides.

No torch. What a file states and is not built is refused by name.
"""

from __future__ import annotations

from typing import Any

from tokenrelay.model.config import Experts, ModelConfig, UnsupportedModelError
from tokenrelay.model.families.rope_parameters import (
    max_position_embeddings,
    read_rope_scaling,
    rope_parameters,
)
from tokenrelay.model.weights.config_check import config_fault
from tokenrelay.model.weights.gguf.architectures import ARCHITECTURES, Architecture
from tokenrelay.model.weights.gguf.metadata import GGUFMetadata
from tokenrelay.model.weights.gguf.rope import gguf_rope_parameters

# The end of a text, of a turn, and of a message that calls a tool: generation stops at each.
_EOS_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
_NOT_BUILT = {
    "rope.dimension_sections": "positions in more than one dimension",
    "rope.scaling.alpha": "rope frequencies scaled by alpha",
    "attention.max_alibi_bias": "positions as a bias on attention",
    "attention.clamp_kqv": "queries, keys and values cut off",
    "attention.temperature_scale": "attention scaled by position",
    "attention.temperature_length": "attention scaled by position",
    "router_logit_softcapping": "a cap on the router's logits",
    "expert_group_count": "experts in groups",
    "expert_shared_count": "several shared experts",
}
_SIGMOID = 2  # of expert_gating_func


def gguf_eos_ids(metadata: GGUFMetadata) -> tuple[int, ...]:
    """The ids that end a generation according to the file's metadata."""
    found = (metadata.token_id(key) for key in _EOS_KEYS)
    return tuple(dict.fromkeys(i for i in found if i is not None))


def config_from_gguf(metadata: GGUFMetadata) -> ModelConfig:
    """The network that the file describes.

    Raises:
        UnsupportedModelError: a network this server cannot run.
        CheckpointError: a value or a tensor is missing, or contradicts another.
    """
    architecture = ARCHITECTURES.get(metadata.architecture)
    if architecture is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModelError(f"GGUF architecture {metadata.architecture!r} is not supported; known: {known}")
    try:
        config = _Reader(metadata, architecture).config()
    except ArithmeticError as error:
        raise metadata.error(f"holds a value out of range: {error}") from error
    if fault := config_fault(config):
        raise metadata.error(fault)
    return config


class _Reader:
    """The metadata of one file, by keys that begin with its architecture's name."""

    def __init__(self, metadata: GGUFMetadata, architecture: Architecture) -> None:
        self._metadata, self._architecture = metadata, architecture
        self._tensors = metadata.tensors
        self._num_layers = self._count("block_count")
        self._hidden_size = self._count("embedding_length")
        self._num_heads = self._count("attention.head_count")
        self._head_dim = self._count("attention.key_length", max(1, self._hidden_size // self._num_heads))

    def config(self) -> ModelConfig:
        self._refuse_what_is_not_built()
        self._check_sizes()
        switches = dict(self._architecture.switches)
        return ModelConfig(
            architecture=self._model_type(),
            vocab_size=self._vocab_size(),
            hidden_size=self._hidden_size,
            num_layers=self._num_layers,
            num_heads=self._num_heads,
            num_kv_heads=self._num_kv_heads(),
            head_dim=self._head_dim,
            norm_eps=self._number(f"attention.layer_norm_{'rms_' if switches['norm'] == 'rms' else ''}epsilon"),
            intermediate_size=self._count("feed_forward_length"),
            eos_token_ids=gguf_eos_ids(self._metadata),
            **switches,
            **self._norms(),
            **self._biases(),
            **self._positions(),
            **self._windows(),
            **self._scales(),
            **self._experts(),
        )

    def _model_type(self) -> str:
        """Mistral's and Mixtral's files are of architecture llama; a window, or experts, tell them apart."""
        if self._metadata.architecture != "llama":
            return self._architecture.model_type
        return "mixtral" if self._value("expert_count") else "mistral" if self._window() else "llama"

    def _num_kv_heads(self) -> int:
        return self._count("attention.head_count_kv", self._num_heads)

    def _norms(self) -> dict[str, Any]:
        """Which there are, by the tensors: one norm serves both sublayers if the MLP has none of its own."""
        has_mlp_norm = f"blk.0.{self._architecture.mlp_norm}.weight" in self._tensors
        match self._architecture.parallel:
            case "never":
                parallel = False
            case "always":
                parallel = True
            case "stated":
                parallel = self._metadata.boolean(self._key("use_parallel_residual"), True)
            case "without_mlp_norm":
                parallel = not has_mlp_norm
        shared = parallel and not has_mlp_norm and "blk.0.attn_norm_2.weight" not in self._tensors
        return {
            "parallel_residual": parallel,
            "shared_norm": shared,
            "norm_bias": self._architecture.switches["norm"] == "rms" or "output_norm.bias" in self._tensors,
        }

    def _biases(self) -> dict[str, Any]:
        """No metadata says it; and a head that is missing is the embedding."""
        layer, found = f"blk.{self._first(sparse=False)}", self._tensors
        experts = f"blk.{self._first(sparse=True)}.ffn_up_exps.bias"
        return {
            "attention_bias": "blk.0.attn_q.bias" in found or "blk.0.attn_qkv.bias" in found,
            "output_bias": "blk.0.attn_output.bias" in found,
            "mlp_bias": f"{layer}.ffn_up.bias" in found or experts in found,
            "lm_head_bias": "output.bias" in found,
            "tie_word_embeddings": "output.weight" not in found,
        }

    def _positions(self) -> dict[str, Any]:
        length = self._count("context_length")
        if self._architecture.switches["positions"] != "rotary":
            return {"max_position_embeddings": length}
        rotary_dim = self._count("rope.dimension_count", self._head_dim)
        if rotary_dim > self._head_dim or rotary_dim % 2:
            raise self._metadata.error(f"rope.dimension_count is {rotary_dim}, in heads of {self._head_dim}")
        stated = gguf_rope_parameters(self._metadata, rotary_dim)
        if stated.get("rope_type") == "yarn":
            stated["truncate"] = self._architecture.truncates_yarn
        rope = rope_parameters({"rope_parameters": stated, "max_position_embeddings": length}, rotary_dim)
        scaling, period = read_rope_scaling(rope), self._architecture.rope_period
        unrotated = range(period - 1, self._num_layers, period) if period else ()
        return {
            "max_position_embeddings": max_position_embeddings(rope, scaling),
            "rope_theta": rope["rope_theta"],
            "rope_scaling": scaling,
            "rotary_dim": rotary_dim if rotary_dim < self._head_dim else 0,
            "unrotated_layers": frozenset(unrotated),
        }

    def _window(self) -> int:
        key = "attention.sliding_window"
        return self._count(key) if self._value(key) else self._architecture.window

    def _windows(self) -> dict[str, Any]:
        window = self._window()
        if not window:
            return {}
        full = frozenset(layer for layer in range(self._num_layers) if not self._has_window(layer))
        return {
            "sliding_window": window,
            "full_attention_layers": full,
            "local_rope_theta": self._local_rope_theta() if full else 0.0,
        }

    def _has_window(self, layer: int) -> bool:
        """The pattern is one truth value per layer, or a period whose last layer sees everything."""
        key = "attention.sliding_window_pattern"
        pattern = self._value(key)
        if pattern is None or isinstance(pattern, int):
            period = self._architecture.window_pattern if pattern is None else pattern
            return not period or layer % period < period - 1
        truths = self._metadata.numbers(self._key(key))
        if len(truths) < self._num_layers:
            raise self._metadata.error(f"{key} has {len(truths)} values for {self._num_layers} layers")
        return bool(truths[layer])

    def _local_rope_theta(self) -> float:
        """OLMo 3's windows have its base without its scaling."""
        if self._metadata.architecture == "olmo2":
            return self._number("rope.freq_base", 10_000.0)
        return self._number("rope.freq_base_swa", self._architecture.local_rope_theta)

    def _scales(self) -> dict[str, Any]:
        """A stated 0 means that there is none."""
        by_root = self._architecture.embeds_by_root
        logits = self._number("logit_scale", 1.0) or 1.0
        return {
            "embedding_scale": self._hidden_size**0.5 if by_root else self._number("embedding_scale", 1.0) or 1.0,
            "residual_scale": self._number("residual_scale", 1.0) or 1.0,
            "logits_scale": 1 / logits if self._architecture.divides_logits else logits,
            "attention_scale": self._number("attention.scale", self._attention_scale()),
            "attention_softcap": self._number("attn_logit_softcapping", self._architecture.attention_softcap),
            "logits_softcap": self._number("final_logit_softcapping", self._architecture.logits_softcap),
        }

    def _attention_scale(self) -> float:
        """Gemma's converter keeps quiet about the one size that differs."""
        is_largest = self._architecture.largest == self._num_layers
        return (self._hidden_size / self._num_heads) ** -0.5 if is_largest else 0.0

    def _experts(self) -> dict[str, Any]:
        if not self._value("expert_count"):
            return {}
        first = f"blk.{self._first(sparse=True)}"
        shared = self._tensors.get(f"{first}.ffn_up_shexp.weight")
        dense = (layer for layer in range(self._num_layers) if not self._is_sparse(layer))
        experts = Experts(
            num_experts=self._count("expert_count"),
            num_experts_per_token=self._count("expert_used_count"),
            intermediate_size=self._count("expert_feed_forward_length", self._count("feed_forward_length")),
            normalize_weights=self._metadata.boolean(
                self._key("expert_weights_norm"), self._architecture.normalizes_experts
            ),
            router_bias=f"{first}.ffn_gate_inp.bias" in self._tensors,
            shared_intermediate_size=shared.shape[0] if shared else 0,
            shared_gate=f"{first}.ffn_gate_inp_shexp.weight" in self._tensors,
        )
        return {"experts": experts, "dense_layers": frozenset(dense)}

    def _is_sparse(self, layer: int) -> bool:
        return f"blk.{layer}.ffn_gate_inp.weight" in self._tensors

    def _first(self, *, sparse: bool) -> int:
        """The first layer with experts, or without; 0 if there is none."""
        return next((layer for layer in range(self._num_layers) if self._is_sparse(layer) is sparse), 0)

    def _refuse_what_is_not_built(self) -> None:
        """Networks that share the architecture's name, and would give plausible nonsense if run as this one."""
        path = self._metadata.path
        for key, what in _NOT_BUILT.items():
            if self._value(key):
                raise UnsupportedModelError(f"{path}: {what} ({key}) are not supported")
        if self._count("attention.value_length", self._head_dim) != self._head_dim:
            raise UnsupportedModelError(f"{path}: another size for values than for keys is not built")
        if self._value("expert_gating_func") == _SIGMOID or self._value("expert_weights_scale") not in (None, 0, 1):
            raise UnsupportedModelError(f"{path}: experts weighted by a sigmoid or a factor are not supported")

    def _check_sizes(self) -> None:
        """Refuse counts that the tensors contradict, before a network of that size is allocated."""
        hidden, q, kv = self._hidden_size, self._num_heads * self._head_dim, self._num_kv_heads() * self._head_dim
        self._check_shape(f"blk.{self._num_layers - 1}.attn_output.weight", hidden, q)
        self._check_shape("token_embd.weight", self._vocab_size(), hidden)
        if "blk.0.attn_qkv.weight" in self._tensors:
            self._check_shape("blk.0.attn_qkv.weight", q + 2 * kv, hidden)
        else:
            self._check_shape("blk.0.attn_k.weight", kv, hidden)
        if self._architecture.switches["positions"] == "learned":
            self._check_shape("position_embd.weight", self._count("context_length"), hidden)
        dense = self._first(sparse=False)
        if not self._is_sparse(dense):
            self._check_shape(f"blk.{dense}.ffn_down.weight", hidden, self._count("feed_forward_length"))
        if self._value("expert_count"):
            self._check_shape(
                f"blk.{self._first(sparse=True)}.ffn_gate_inp.weight", self._count("expert_count"), hidden
            )

    def _check_shape(self, name: str, *shape: int) -> None:
        info = self._tensors.get(name)
        if info is None or info.shape != shape:
            found = info.shape if info else "be missing"
            raise self._metadata.error(f"tensor {name!r} should have shape {shape}, not {found}")

    def _vocab_size(self) -> int:
        embeddings = self._tensors.get("token_embd.weight")
        return embeddings.shape[0] if embeddings else 0

    def _key(self, name: str) -> str:
        return f"{self._metadata.architecture}.{name}"

    def _value(self, name: str) -> Any:
        return self._metadata.values.get(self._key(name))

    def _count(self, name: str, default: int | None = None) -> int:
        return self._metadata.count(self._key(name), default)

    def _number(self, name: str, default: float | None = None) -> float:
        return self._metadata.number(self._key(name), default)
