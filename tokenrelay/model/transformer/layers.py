"""Normalisation and the MLP: the parts around attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.transformer import kernels


class RMSNorm(nn.Module):
    """Root mean square normalisation (Zhang & Sennrich 2019), with the residual addition before it fused in."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise ``x`` [T, C]. With a residual: add x to it in place, and normalise the sum."""
        if residual is None:
            return kernels.rms_norm(x, self.weight, self.eps)
        return kernels.add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016), with the residual addition before it fused in."""

    def __init__(self, size: int, eps: float, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """As RMSNorm.forward."""
        if residual is None:
            return kernels.layer_norm(x, self.weight, self.bias, self.eps)
        return kernels.add_layer_norm(x, residual, self.weight, self.bias, self.eps)


class NoNorm(nn.Module):
    """The residual addition alone."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """The sum [T, C]."""
        return residual.add_(x)


def make_norm(config: ModelConfig) -> nn.Module:
    """Of the network's kind, over its hidden size."""
    if config.norm == "rms":
        return RMSNorm(config.hidden_size, config.norm_eps)
    return LayerNorm(config.hidden_size, config.norm_eps, bias=config.norm_bias)


class MLP(nn.Module):
    """down(act(up x)), or down(act(gate x) · up x) when gated (Shazeer 2020); gate and up are one product."""

    def __init__(self, config: ModelConfig, intermediate_size: int) -> None:
        super().__init__()
        width = intermediate_size * (2 if config.gated_mlp else 1)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self._activation = config.activation
        self._apply_activation = kernels.gated_activation if config.gated_mlp else kernels.activation

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.down_proj(self._apply_activation(self.up_proj(x), self._activation))
        return hidden
