"""Every switch of ModelConfig, against its formula; and a row's bits, whatever is computed beside it."""

from __future__ import annotations

import dataclasses
import re
import zlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.model.transformer.plain_transformer import plain_logits
from tests.model.transformer.steps import logits_of
from tokenrelay.model.config import Experts, ModelConfig
from tokenrelay.model.families import Rule
from tokenrelay.model.transformer.kernels import native
from tokenrelay.model.transformer.kernels.native_layers import NativeLayers
from tokenrelay.model.transformer.loading import load_transformer
from tokenrelay.model.transformer.moe import MixtureOfExperts
from tokenrelay.model.transformer.placing import WeightsError
from tokenrelay.model.transformer.sinusoids import sinusoidal_table
from tokenrelay.model.transformer.transformer import Transformer

CPU = torch.device("cpu")
LENGTH = 40
LLAMA = ModelConfig(
    architecture="switches",
    vocab_size=60,
    hidden_size=32,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    max_position_embeddings=LENGTH,
    norm="rms",
    norm_eps=1e-5,
    activation="silu",
    gated_mlp=True,
    positions="rotary",
)
TORCHS_NAMES = {
    "self_attn.in_proj_weight": "attention.qkv_proj.weight",
    "self_attn.in_proj_bias": "attention.qkv_proj.bias",
    "self_attn.out_proj.weight": "attention.o_proj.weight",
    "self_attn.out_proj.bias": "attention.o_proj.bias",
    "linear1.weight": "mlp.up_proj.weight",
    "linear1.bias": "mlp.up_proj.bias",
    "linear2.weight": "mlp.down_proj.weight",
    "linear2.bias": "mlp.down_proj.bias",
    "norm1.weight": "attention_norm.weight",
    "norm1.bias": "attention_norm.bias",
    "norm2.weight": "mlp_norm.weight",
    "norm2.bias": "mlp_norm.bias",
}
OWN_NAMES = (Rule(r"(.*)", r"\1"),)
GEMMA = {"sliding_window": 9, "full_attention_layers": frozenset({1})}
ROUTED = Experts(num_experts=5, num_experts_per_token=2, intermediate_size=24)
SHARED = dataclasses.replace(ROUTED, normalize_weights=False, router_bias=True, shared_intermediate_size=16)
VASWANI: dict[str, Any] = {
    "norm": "layer",
    "norm_placement": "after_sum",
    "final_norm": False,
    "activation": "relu",
    "gated_mlp": False,
    "positions": "sinusoidal",
    "num_kv_heads": 4,
    "embedding_scale": 32**0.5,
    **dict.fromkeys(("attention_bias", "output_bias", "mlp_bias", "lm_head_bias"), True),
}

SWITCHES: dict[str, dict[str, Any]] = {
    "llama": {},
    "post": {"norm_placement": "post"},
    "sandwich": {"norm_placement": "sandwich"},
    "after the sum": {"norm_placement": "after_sum"},
    "parallel": {"parallel_residual": True, "norm": "layer"},
    "parallel, one norm": {"parallel_residual": True, "shared_norm": True, "norm": "layer", "norm_bias": False},
    "norms without bias": {"norm": "layer", "norm_bias": False},
    "no final norm": {"final_norm": False},
    "norm of each head": {"qk_norm": "head"},
    "norm of all heads": {"qk_norm": "whole"},
    "attention scale": {"attention_scale": 0.5},
    "capped scores": {"attention_softcap": 0.7},
    "capped logits": {"logits_softcap": 0.4},
    "learned sinks": {"learned_sinks": True, "sliding_window": 9},
    "scales": {"embedding_scale": 3.5, "residual_scale": 0.3, "logits_scale": 0.25},
    "residual scale after norms": {"norm_placement": "sandwich", "residual_scale": 0.3},
    "residual scale, parallel": {"parallel_residual": True, "residual_scale": 0.3},
    "biases": dict.fromkeys(("attention_bias", "output_bias", "mlp_bias", "lm_head_bias"), True),
    "tied, biased head": {"tie_word_embeddings": True, "lm_head_bias": True},
    "learned positions": {"positions": "learned"},
    "sinusoids": {"positions": "sinusoidal"},
    "no positions": {"positions": "none"},
    "a third of each head rotated": {"rotary_dim": 4},
    "some layers see all": GEMMA,
    "windowed layers turn otherwise": GEMMA | {"local_rope_theta": 50.0, "rope_theta": 9_000.0},
    "unrotated layers": {"unrotated_layers": frozenset({0, 2})},
    "relu2": {"activation": "relu2", "gated_mlp": False},
    "swiglu_oai": {"activation": "swiglu_oai", "mlp_bias": True},
    "experts": {"experts": ROUTED},
    "experts, not normalised, one shared": {"experts": SHARED, "dense_layers": frozenset({1})},
    "experts, shared one gated": {"experts": dataclasses.replace(SHARED, shared_gate=True), "mlp_bias": True},
    "all experts": {"experts": dataclasses.replace(ROUTED, num_experts_per_token=5)},
    "Vaswani et al. 2017": VASWANI,
}

needs_native = pytest.mark.skipif(not native.is_available(), reason=native.why_unavailable() or "native library")


def random_weights(config: ModelConfig) -> dict[str, Tensor]:
    """By our own names, and the same wherever a name has the same shape; norms about 1, sinks and biases about 0."""
    with torch.device("meta"):
        names = {name: parameter.shape for name, parameter in Transformer(config, LENGTH).named_parameters()}
    weights = {}
    for name, shape in names.items():
        torch.manual_seed(zlib.crc32(name.encode()))
        weights[name] = torch.randn(shape) * (0.25 if len(shape) == 2 else 0.3) + name.endswith("norm.weight")
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["embed_tokens.weight"]
    return weights


def load(config: ModelConfig, weights: dict[str, Tensor], rules: tuple[Rule, ...] = OWN_NAMES) -> Transformer:
    return load_transformer(config, weights.items(), rules, max_model_len=LENGTH, dtype=torch.float32, device=CPU)


@pytest.fixture(params=SWITCHES)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return dataclasses.replace(LLAMA, **SWITCHES[request.param])


@torch.inference_mode()
def test_a_switch_does_what_its_formula_says(config: ModelConfig) -> None:
    weights, ids = random_weights(config), torch.randint(0, 60, (LENGTH,))
    logits = logits_of(load(config, weights), [ids], LENGTH)[0]
    torch.testing.assert_close(logits, plain_logits(config, weights, ids), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_each_switch_changes_the_result() -> None:
    """Or the test above would compare less than it says."""
    seen: dict[str, Tensor] = {}
    for name, switches in SWITCHES.items():
        config = dataclasses.replace(LLAMA, **switches)
        ids = torch.arange(LENGTH) % 60
        seen[name] = logits_of(load(config, random_weights(config)), [ids], LENGTH)[0]
    names = list(seen)
    alike = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if torch.allclose(seen[a], seen[b], atol=1e-3)]
    assert alike == []


@needs_native
@torch.inference_mode()
def test_a_row_has_the_same_bits_alone_in_chunks_and_among_others(config: ModelConfig) -> None:
    model = load(config, random_weights(config))
    texts = [torch.randint(0, 60, (length,)) for length in (LENGTH, 17)]
    together = logits_of(model, texts, 7)
    for text, rows in zip(texts, together, strict=True):
        for chunk in (1, LENGTH):
            assert torch.equal(logits_of(model, [text], chunk)[0], rows)


@needs_native
def test_native_layers_run_what_they_cover_and_nothing_else() -> None:
    def is_native(**switches: Any) -> bool:
        config = dataclasses.replace(LLAMA, **switches)
        return isinstance(load(config, random_weights(config)).run_layers, NativeLayers)

    assert is_native()
    assert is_native(embedding_scale=2.0, logits_softcap=3.0, attention_scale=0.3, lm_head_bias=True)
    assert is_native(norm="layer", norm_bias=False, positions="sinusoidal", **GEMMA)
    assert not is_native(norm_placement="after_sum")


@torch.inference_mode()
def test_the_decoder_of_the_paper_is_torchs_layer_with_a_causal_mask() -> None:
    config = dataclasses.replace(LLAMA, **VASWANI, head_dim=8)
    weights, ids = random_weights(config), torch.randint(0, 60, (LENGTH,))
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    x = weights["embed_tokens.weight"][ids] * 32**0.5 + sinusoidal_table(LENGTH, 32)
    for layer in range(config.num_layers):
        theirs = nn.TransformerEncoderLayer(32, 4, 40, dropout=0.0, batch_first=True, norm_first=False)
        theirs.load_state_dict({new: weights[f"layers.{layer}.{old}"] for new, old in TORCHS_NAMES.items()})
        x = theirs.eval()(x.unsqueeze(0), src_mask=mask, is_causal=True)[0]
    expected = F.linear(x, weights["lm_head.weight"], weights["lm_head.bias"])
    torch.testing.assert_close(logits_of(load(config, weights), [ids], 7)[0], expected, rtol=1e-4, atol=1e-4)


@needs_native
@torch.inference_mode()
def test_which_of_equally_likely_experts_is_chosen_does_not_depend_on_other_rows() -> None:
    config = dataclasses.replace(LLAMA, experts=dataclasses.replace(ROUTED, num_experts=64))
    weights, texts = random_weights(config), [torch.randint(0, 60, (length,)) for length in (LENGTH, 20)]
    for name in [name for name in weights if "router" in name]:
        weights[name] = weights[name][:4].repeat(16, 1)
    model = load(config, weights)
    together = logits_of(model, texts, 9)
    for text, rows in zip(texts, together, strict=True):
        assert torch.equal(logits_of(model, [text], 1)[0], rows)


@torch.inference_mode()
def test_all_experts_weighted_by_zero_or_more_are_the_chosen_ones() -> None:
    """The way of a GPU, whose shapes do not depend on data."""
    config = dataclasses.replace(LLAMA, experts=ROUTED)
    mixture = load(config, random_weights(config)).layers[0].mlp
    assert isinstance(mixture, MixtureOfExperts)
    x = torch.randn(20, 32)
    routed = mixture.route(x)
    torch.testing.assert_close(mixture.sum_of_all(x, *routed), mixture.sum_of_chosen(x, *routed))


@torch.inference_mode()
def test_a_stack_of_experts_is_taken_apart() -> None:
    config = dataclasses.replace(LLAMA, experts=ROUTED, mlp_bias=True)
    weights = random_weights(config)
    rules = (
        Rule(r"(.*)\.up\.(weight|bias)", r"\1.experts.{expert}.up_proj.\2"),
        Rule(r"(.*)\.down\.weight", r"\1.experts.{expert}.down_proj.weight", layout="transposed"),
        *OWN_NAMES,
    )
    stacks = {name: tensor for name, tensor in weights.items() if not re.search(r"experts.*(up|down_proj\.w)", name)}
    for mlp in (f"layers.{layer}.mlp" for layer in range(config.num_layers)):
        for own, stored in (
            ("up_proj.weight", "up.weight"),
            ("up_proj.bias", "up.bias"),
            ("down_proj.weight", "down.weight"),
        ):
            parts = [weights[f"{mlp}.experts.{expert}.{own}"] for expert in range(5)]
            stacks[f"{mlp}.{stored}"] = torch.stack([part.T if stored == "down.weight" else part for part in parts])
    ids = torch.randint(0, 60, (LENGTH,))
    ours, theirs = (logits_of(load(config, *source), [ids], LENGTH)[0] for source in ((weights,), (stacks, rules)))
    assert torch.equal(ours, theirs)
    stacks["layers.1.mlp.up.bias"] = stacks["layers.1.mlp.up.bias"][:4]
    with pytest.raises(WeightsError, match=r"does not fill layers\.1\.mlp\.experts\.4\.up_proj\.bias"):
        load(config, stacks, rules)


def test_sinks_and_norms_stay_exact_where_matrices_are_rounded() -> None:
    config = dataclasses.replace(LLAMA, learned_sinks=True, qk_norm="head")
    tensors = random_weights(config)
    model = load_transformer(config, tensors.items(), OWN_NAMES, max_model_len=LENGTH, dtype=torch.bfloat16, device=CPU)
    for name in ("attention.sinks", "attention.q_norm.weight", "attention.k_norm.weight", "mlp_norm.weight"):
        assert torch.equal(model.get_parameter(f"layers.1.{name}"), tensors[f"layers.1.{name}"])
