"""What llama.cpp knows of an architecture and its files do not say. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

_RMS = {"norm": "rms", "activation": "silu", "gated_mlp": True, "positions": "rotary"}
_LAYER = {"norm": "layer", "activation": "gelu_tanh", "gated_mlp": False, "positions": "rotary"}
_GEMMA = _RMS | {"activation": "gelu_tanh"}
_SANDWICH = _GEMMA | {"norm_placement": "sandwich"}
_GPT_OSS = _RMS | {"activation": "swiglu_oai", "learned_sinks": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One value of ``general.architecture``; what is left out is as in Llama."""

    model_type: str  # transformers' name
    switches: Mapping[str, Any] = field(default_factory=lambda: _RMS)  # of ModelConfig
    rotates_pairs: bool = False  # rope turns neighbours; the rows of q and k are in that order
    parallel: Literal["never", "always", "stated", "without_mlp_norm"] = "never"
    mlp_norm: str = "ffn_norm"
    window: int = 0  # if the file states none
    window_pattern: int = 0  # every so many-th layer sees everything; 0: none does
    local_rope_theta: float = 0.0  # of layers with a window
    rope_period: int = 0  # every so many-th layer has no positions
    embeds_by_root: bool = False  # embeddings are scaled by the root of their size
    attention_softcap: float = 0.0
    logits_softcap: float = 0.0
    largest: int = 0  # layers of the one size whose attention is scaled by hidden_size / num_heads, not head_dim
    divides_logits: bool = False  # by what is stated; others multiply
    normalizes_experts: bool = True
    truncates_yarn: bool = True


ARCHITECTURES = {
    "llama": Architecture(model_type="llama", rotates_pairs=True),
    "smollm3": Architecture(model_type="smollm3", rotates_pairs=True, rope_period=4),
    "arcee": Architecture(
        model_type="arcee", switches=_RMS | {"activation": "relu2", "gated_mlp": False}, rotates_pairs=True
    ),
    "granite": Architecture(model_type="granite", rotates_pairs=True, divides_logits=True),
    "granitemoe": Architecture(model_type="granitemoe", rotates_pairs=True, divides_logits=True),
    "ernie4_5": Architecture(model_type="ernie4_5", rotates_pairs=True),
    "qwen2": Architecture(model_type="qwen2"),
    "qwen2moe": Architecture(model_type="qwen2_moe", normalizes_experts=False),
    "qwen3": Architecture(model_type="qwen3", switches=_RMS | {"qk_norm": "head"}),
    "qwen3moe": Architecture(model_type="qwen3_moe", switches=_RMS | {"qk_norm": "head"}),
    "seed_oss": Architecture(model_type="seed_oss", mlp_norm="post_attention_norm"),
    "olmo2": Architecture(
        model_type="olmo2", switches=_RMS | {"qk_norm": "whole", "norm_placement": "post"}, window_pattern=4
    ),
    "olmo": Architecture(
        model_type="olmo", switches=_RMS | {"norm": "layer", "norm_weight": False}, rotates_pairs=True
    ),
    "olmoe": Architecture(model_type="olmoe", switches=_RMS | {"qk_norm": "whole"}, normalizes_experts=False),
    "phi3": Architecture(model_type="phi3"),
    "gemma": Architecture(model_type="gemma", switches=_GEMMA, embeds_by_root=True),
    "gemma2": Architecture(
        model_type="gemma2",
        switches=_SANDWICH,
        embeds_by_root=True,
        window=4096,
        window_pattern=2,
        attention_softcap=50.0,
        logits_softcap=30.0,
        largest=46,
    ),
    "gemma3": Architecture(
        model_type="gemma3_text",
        switches=_SANDWICH | {"qk_norm": "head"},
        embeds_by_root=True,
        window_pattern=6,
        local_rope_theta=10_000.0,
        largest=62,
    ),
    "gpt-oss": Architecture(
        model_type="gpt_oss",
        switches=_GPT_OSS,
        mlp_norm="post_attention_norm",
        window_pattern=2,
        truncates_yarn=False,
    ),
    "gpt2": Architecture(model_type="gpt2", switches=_LAYER | {"positions": "learned"}),
    "gptneox": Architecture(model_type="gpt_neox", switches=_LAYER | {"activation": "gelu"}, parallel="stated"),
    "phi2": Architecture(model_type="phi", switches=_LAYER, parallel="always"),
    "falcon": Architecture(model_type="falcon", switches=_LAYER | {"activation": "gelu"}, parallel="always"),
    "starcoder2": Architecture(model_type="starcoder2", switches=_LAYER),
    "nemotron": Architecture(model_type="nemotron", switches=_LAYER | {"activation": "relu2"}),
    "stablelm": Architecture(model_type="stablelm", switches=_RMS | {"norm": "layer"}, parallel="without_mlp_norm"),
    "command-r": Architecture(
        model_type="cohere", switches=_RMS | {"norm": "layer"}, rotates_pairs=True, parallel="always"
    ),
}
