"""A mixture of experts in the MLP's place (Shazeer et al. 2017): a router sends every token to a few of many MLPs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenrelay.model.config import Experts, ModelConfig
from tokenrelay.model.transformer.layers import MLP


class MixtureOfExperts(nn.Module):
    """The weighted sum of the chosen experts, and of one that all tokens share, if there is one.

    A token's sum is taken in ascending order of its experts, whatever other tokens go through them.
    """

    def __init__(self, config: ModelConfig, experts: Experts) -> None:
        super().__init__()
        self.router = nn.Linear(config.hidden_size, experts.num_experts, bias=experts.router_bias)
        self.experts = nn.ModuleList(MLP(config, experts.intermediate_size) for _ in range(experts.num_experts))
        shared = experts.shared_intermediate_size
        self.shared_expert = MLP(config, shared) if shared else None
        self.shared_gate = nn.Linear(config.hidden_size, 1, bias=False) if experts.shared_gate else None
        self._num_chosen, self._normalize_weights = experts.num_experts_per_token, experts.normalize_weights

    def forward(self, x: Tensor) -> Tensor:
        """x [T, C] → [T, C]."""
        chosen, weights = self.route(x)
        out = self.sum_of_all(x, chosen, weights) if x.is_cuda else self.sum_of_chosen(x, chosen, weights)
        if self.shared_expert is None:
            return out
        shared: Tensor = self.shared_expert(x)
        return out + (shared if self.shared_gate is None else shared * _sigmoid(self.shared_gate(x)))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Experts and their weights [T, K], the likeliest first; which of equals, is a function of the row alone."""
        logits = self.router(x).float()
        chosen = logits.topk(self._num_chosen, dim=-1).indices
        if self._normalize_weights:
            return chosen, logits.gather(1, chosen).softmax(-1).to(x.dtype)
        return chosen, logits.softmax(-1).gather(1, chosen).to(x.dtype)

    def sum_of_chosen(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Each expert on its own rows alone."""
        out = torch.zeros_like(x)
        for expert in sorted(set(chosen.flatten().tolist())):
            rows, rank = (chosen == expert).nonzero(as_tuple=True)
            out[rows] += self.experts[expert](x[rows]) * weights[rows, rank].unsqueeze(1)
        return out

    def sum_of_all(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Each expert on all rows, most of them with weight 0: in a captured graph no shape may depend on data."""
        dense = weights.new_zeros(len(x), len(self.experts)).scatter(1, chosen, weights)
        out = torch.zeros_like(x)
        for expert, weight in zip(self.experts, dense.unbind(1), strict=True):
            out += expert(x) * weight.unsqueeze(1)
        return out


def _sigmoid(logits: Tensor) -> Tensor:
    """Of [T, 1], as a softmax against 0: torch rounds a sigmoid one way or another by its place in the tensor."""
    return F.pad(logits, (0, 1)).softmax(-1)[:, :1]
