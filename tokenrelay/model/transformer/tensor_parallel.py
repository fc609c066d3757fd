"""Tensor parallelism (Shoeybi et al. 2019, "Megatron-LM"): every rank computes some heads and some of the MLP's width.

The first matrix of attention and MLP is cut by rows, so that a rank has whole heads and whole neurons; the second by
columns, so that what comes out is a rank's part of a sum, and one sum over the ranks follows. Embeddings, norms and
routers are small or needed whole, so every rank has them; the output head only the leader, who alone samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.quantized import GROUP, Quantized
from tokenrelay.model.transformer.communicator import Communicator
from tokenrelay.model.transformer.transformer import Transformer

ROWS, COLUMNS = -2, -1


class _Spans(NamedTuple):
    """Of ``total`` equal parts of a dimension, some: (begin, count) each."""

    total: int
    kept: Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Share:
    """What rank ``rank`` of ``size`` holds of the network that ``config`` describes."""

    config: ModelConfig
    rank: int
    size: int

    def __post_init__(self) -> None:
        """Raises ValueError: the network cannot be divided so; the message says what can be done."""
        if obstacle := _obstacle(self.config, self.size):
            possible = [n for n in range(1, self.config.num_heads + 1) if not _obstacle(self.config, n)]
            raise ValueError(
                f"tensor_parallel_size {self.size} is not possible with {obstacle}; "
                f"set it to {' or '.join(map(str, possible))}"
            )

    @property
    def own_config(self) -> ModelConfig:
        """Of this rank's network. With fewer key and value heads than ranks, several ranks have the same."""
        config, experts, size = self.config, self.config.experts, self.size
        if experts:
            experts = replace(
                experts,
                intermediate_size=experts.intermediate_size // size,
                shared_intermediate_size=experts.shared_intermediate_size // size,
            )
        return replace(
            config,
            num_heads=config.num_heads // size,
            num_kv_heads=max(1, config.num_kv_heads // size),
            intermediate_size=config.intermediate_size // size,
            experts=experts,
            tie_word_embeddings=config.tie_word_embeddings and not self.rank,  # the others have no head to share with
        )

    def part(self, target: str, shard: str, tensor: Tensor | Quantized) -> Tensor | Quantized | None:
        """Of a tensor that fills ``target``, or such rows of it; None: this rank needs nothing of it.

        Experts that come stacked have one dimension more, in front.
        """
        module, _, kind = target.rpartition(".")
        dim = COLUMNS if kind == "bias" else ROWS
        match module.rpartition(".")[2]:
            case "lm_head":
                return None if self.rank else tensor
            case "qkv_proj":
                return _cut(tensor, dim, self._heads(shard))
            case "up_proj":
                return _cut(tensor, dim, self._neurons(shard))
            case "o_proj" | "down_proj" if kind == "weight":
                return _cut(tensor, COLUMNS, _Spans(self.size, [(self.rank, 1)]))
            case "o_proj" | "down_proj" if self.rank:  # of a sum, one summand has the bias
                return torch.zeros(tensor.shape)
        return _cut(tensor, COLUMNS, self._heads("q")) if kind == "sinks" else tensor

    def _heads(self, shard: str) -> _Spans:
        """Of q, k, v, or of all three one after the other."""
        own, heads, kv_heads = self.own_config, self.config.num_heads, self.config.num_kv_heads
        q = self.rank * own.num_heads, own.num_heads
        first, count = self.rank * kv_heads // self.size, own.num_kv_heads
        if shard:
            return _Spans(heads, [q]) if shard == "q" else _Spans(kv_heads, [(first, count)])
        return _Spans(heads + 2 * kv_heads, [q, (heads + first, count), (heads + kv_heads + first, count)])

    def _neurons(self, shard: str) -> _Spans:
        """Of gate or up, or of both one after the other."""
        if shard or not self.config.gated_mlp:
            return _Spans(self.size, [(self.rank, 1)])
        return _Spans(2 * self.size, [(self.rank, 1), (self.size + self.rank, 1)])


class SummedOverRanks(nn.Module):
    """What a module computes with its rank's share of the weights is a summand of the layer's output."""

    def __init__(self, module: nn.Module, communicator: Communicator) -> None:
        super().__init__()
        self.module = module
        self._communicator = communicator

    def forward(self, *args: Any) -> Tensor:
        """The whole network's output, at every rank."""
        return self._communicator.sum(self.module(*args))


def sum_over_ranks(model: Transformer, communicator: Communicator) -> None:
    """Put one sum behind every attention and every MLP of ``model``, the experts of a mixture together."""
    layers: Any = model.layers
    for layer in layers:
        layer.attention.o_proj = SummedOverRanks(layer.attention.o_proj, communicator)
        layer.mlp = SummedOverRanks(layer.mlp, communicator)


def _obstacle(config: ModelConfig, size: int) -> str:
    """What of this network so many ranks cannot share, in words; empty if they can."""
    kv_heads, experts = config.num_kv_heads, config.experts
    numbers = {
        f"{config.num_heads} attention heads": config.num_heads % size,
        f"{kv_heads} key and value heads": kv_heads % size and size % kv_heads,
        f"{config.intermediate_size} neurons of an MLP": config.intermediate_size % size,
    }
    if experts:
        numbers[f"{experts.intermediate_size} neurons of an expert"] = experts.intermediate_size % size
        numbers["the shared expert"] = experts.shared_intermediate_size % size
    if size > 1 and config.qk_norm == "whole":
        return "a norm over all heads"
    return next((what for what, rest in numbers.items() if rest), "")


def _cut(tensor: Tensor | Quantized, dim: int, spans: _Spans) -> Tensor | Quantized:
    """What cannot be cut so stays whole, and the loader will refuse it by name."""
    if tensor.shape[dim] % spans.total:
        return tensor
    if isinstance(tensor, Quantized) and dim == COLUMNS and tensor.shape[dim] // spans.total % GROUP:
        tensor = tensor.dequantized()  # a group would belong to two ranks

    def kept(part: Tensor) -> Tensor:
        unit = part.shape[dim] // spans.total
        return torch.cat([part.narrow(dim, unit * begin, unit * count) for begin, count in spans.kept], dim)

    return tensor.mapped(kept) if isinstance(tensor, Quantized) else kept(tensor)
