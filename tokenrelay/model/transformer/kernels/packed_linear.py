"""Linear layers with packed weights: a replacement for ``nn.Linear``, made after the weights are loaded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenrelay.model.transformer import kernels
from tokenrelay.model.transformer.kernels import native, reference


class PackedLinear(nn.Module):
    """y = x W^T + b with W in panels [ceil(N / 16), K, 16], in the dtype it was loaded in (bf16 or fp32).

    Without the native library W stays [N, K] and becomes fp32, the dtype of the activations.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight [N, K], bias [N]."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        stored = weight.detach() if weight.dtype in native.STORED else weight.detach().float()
        self.register_buffer("weight", reference.pack(stored) if native.is_available() else stored.float())
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N]."""
        return kernels.linear(x, self.weight, self.bias, self.out_features)


@torch.no_grad()
def replace_linears(module: nn.Module) -> None:
    """Swap every ``nn.Linear`` below ``module`` for a ``PackedLinear``, one at a time, each original freed.

    A head tied to the embedding gets its own packed copy, since the embedding still needs its [V, D] rows: that costs
    V x D once more (57 MB for SmolLM2-135M in bf16).
    """
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child.weight, child.bias))
        else:
            replace_linears(child)
