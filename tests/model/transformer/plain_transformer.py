"""The network of a ``ModelConfig`` as its formulas say it: one text, no cache, nothing fused, plain torch.

Reads the weights of our network by their names, and nothing else of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenrelay.model.config import ModelConfig

Weights = Mapping[str, Tensor]
Sublayer = Callable[[Tensor], Tensor]


def plain_logits(config: ModelConfig, weights: Weights, ids: Tensor) -> Tensor:
    """[T] ids → [T, vocabulary]."""
    x = weights["embed_tokens.weight"][ids] * config.embedding_scale
    if config.positions == "learned":
        x = x + weights["embed_positions.weight"][: len(ids)]
    if config.positions == "sinusoidal":
        x = x + torch.stack([_sinusoid(position, config.hidden_size) for position in range(len(ids))])
    for layer in range(config.num_layers):
        x = _layer(config, weights, layer, x)
    hidden = _norm(config, weights, "norm", x) if config.final_norm else x
    logits = _linear(weights, "lm_head", hidden) * config.logits_scale
    cap = config.logits_softcap
    return cap * (logits / cap).tanh() if cap else logits


def _sinusoid(position: int, size: int) -> Tensor:
    angles = [position / 10_000 ** (2 * (i // 2) / size) for i in range(size)]
    return torch.tensor([torch.tensor(a).sin() if i % 2 == 0 else torch.tensor(a).cos() for i, a in enumerate(angles)])


def _layer(config: ModelConfig, weights: Weights, layer: int, x: Tensor) -> Tensor:
    def attention(hidden: Tensor) -> Tensor:
        return _attention(config, weights, layer, hidden)

    def mlp(hidden: Tensor) -> Tensor:
        name = f"layers.{layer}.mlp"
        found = _experts if config.is_sparse(layer) else _mlp
        return found(config, weights, name, hidden)

    def norm(name: str) -> Sublayer:
        return lambda hidden: _norm(config, weights, f"layers.{layer}.{name}", hidden)

    scale = config.residual_scale
    n1, n2 = norm("attention_norm"), norm("attention_norm" if config.shared_norm else "mlp_norm")
    if config.parallel_residual:
        return x + scale * attention(n1(x)) + scale * mlp(n2(x))
    for sublayer, before, after in ((attention, n1, "attention_post_norm"), (mlp, n2, "mlp_post_norm")):
        match config.norm_placement:
            case "pre":
                x = x + scale * sublayer(before(x))
            case "post":
                x = x + scale * before(sublayer(x))
            case "sandwich":
                x = x + scale * norm(after)(sublayer(before(x)))
            case "after_sum":
                x = before(x + scale * sublayer(x))
    return x


def _norm(config: ModelConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    if config.norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, config.norm_eps)
    return F.rms_norm(x, x.shape[-1:], weight, config.norm_eps)


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def _attention(config: ModelConfig, weights: Weights, layer: int, x: Tensor) -> Tensor:
    name, length = f"layers.{layer}.attention", len(x)
    qkv = _linear(weights, f"{name}.qkv_proj", x)
    q, k, v = torch.split(qkv, [config.q_size, config.kv_size, config.kv_size], dim=1)
    if config.qk_norm == "whole":
        q, k = (_rms_norm(config, weights[f"{name}.{n}.weight"], t) for n, t in (("q_norm", q), ("k_norm", k)))
    q, k, v = (t.view(length, -1, config.head_dim).transpose(0, 1) for t in (q, k, v))  # [heads, T, D]
    if config.qk_norm == "head":
        q, k = (_rms_norm(config, weights[f"{name}.{n}.weight"], t) for n, t in (("q_norm", q), ("k_norm", k)))
    if config.positions == "rotary" and layer not in config.unrotated_layers:
        q, k = _rotated(config, layer, q), _rotated(config, layer, k)
    group = config.num_heads // config.num_kv_heads
    shares = _shares(config, weights, layer, q, k.repeat_interleave(group, 0))
    return _linear(weights, f"{name}.o_proj", (shares @ v.repeat_interleave(group, 0)).transpose(0, 1).flatten(1))


def _rms_norm(config: ModelConfig, weight: Tensor, x: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, config.norm_eps)


def _rotated(config: ModelConfig, layer: int, x: Tensor) -> Tensor:
    """As complex numbers: (i, i + R/2) is one, and turns by position * theta^(-2i/R)."""
    turning = config.rotary_dim or config.head_dim
    theta = (config.local_rope_theta if config.window(layer) else 0.0) or config.rope_theta
    angles = torch.outer(torch.arange(x.shape[1]), theta ** -(torch.arange(0, turning, 2) / turning))
    first, second, still = torch.split(x, [turning // 2, turning // 2, config.head_dim - turning], dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag, still), dim=-1)


def _shares(config: ModelConfig, weights: Weights, layer: int, q: Tensor, k: Tensor) -> Tensor:
    """What each query takes of each value [heads, T, T]."""
    scores = q @ k.transpose(1, 2) * (config.attention_scale or config.head_dim**-0.5)
    if config.attention_softcap:
        scores = config.attention_softcap * (scores / config.attention_softcap).tanh()
    seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
    if config.window(layer):
        seen = seen.triu(1 - config.window(layer))
    powers = scores.exp() * seen
    sinks = weights[f"layers.{layer}.attention.sinks"].exp() if config.learned_sinks else torch.zeros(config.num_heads)
    return powers / (powers.sum(-1, keepdim=True) + sinks.view(-1, 1, 1))


def _mlp(config: ModelConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    up = _linear(weights, f"{name}.up_proj", x)
    return _linear(weights, f"{name}.down_proj", _activated(config, up))


def _activated(config: ModelConfig, up: Tensor) -> Tensor:
    gate, rest = up.chunk(2, dim=-1) if config.gated_mlp else (up, torch.ones(()))
    match config.activation:
        case "silu":
            return F.silu(gate) * rest
        case "gelu":
            return F.gelu(gate) * rest
        case "gelu_tanh":
            return F.gelu(gate, approximate="tanh") * rest
        case "relu":
            return F.relu(gate) * rest
        case "relu2":
            return F.relu(gate) ** 2 * rest
        case "swiglu_oai":
            gate, rest = gate.clamp(max=7.0), rest.clamp(-7.0, 7.0)
            return gate * torch.sigmoid(1.702 * gate) * (rest + 1)


def _experts(config: ModelConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    """Token by token: the likeliest experts' outputs, by their probabilities."""
    experts = config.experts
    assert experts is not None
    rows = []
    for row in x:
        chances = _linear(weights, f"{name}.router", row).softmax(-1)
        chosen = chances.topk(experts.num_experts_per_token).indices.tolist()
        total = sum(chances[e] for e in chosen) if experts.normalize_weights else 1.0
        out = sum(chances[e] / total * _mlp(config, weights, f"{name}.experts.{e}", row) for e in chosen)
        assert isinstance(out, Tensor)
        if experts.shared_intermediate_size:
            gate = _linear(weights, f"{name}.shared_gate", row).sigmoid() if experts.shared_gate else 1.0
            out = out + gate * _mlp(config, weights, f"{name}.shared_expert", row)
        rows.append(out)
    return torch.stack(rows)
