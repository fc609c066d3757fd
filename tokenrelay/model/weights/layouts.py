"""How checkpoints store some tensors in another way than our network holds them; ``Rule.layout`` names one of these."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokenrelay.model.config import ModelConfig

Layout = Callable[[Tensor, ModelConfig], Tensor]


def transposed(stored: Tensor, config: ModelConfig) -> Tensor:
    """[in, out], as GPT-2's Conv1D has it -> [out, in]."""
    return stored.transpose(0, 1)


def plus_one(stored: Tensor, config: ModelConfig) -> Tensor:
    """A norm's weights less 1, as Gemma has them; summed in fp32, where small ones do not vanish beside the 1."""
    return stored.float() + 1


def grouped_qkv(stored: Tensor, config: ModelConfig) -> Tensor:
    """The queries of a group of heads, then its key and its value; groups one after the other (NeoX, Falcon)."""
    groups = stored.reshape(config.num_kv_heads, -1, config.head_dim, *stored.shape[1:])
    return torch.cat([part.flatten(0, 2) for part in (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])])


def paired_rotary(stored: Tensor, config: ModelConfig) -> Tensor:
    """Heads whose neighbouring elements are rotated together (GPT-J) -> those half of the rotated part apart."""
    heads = stored.reshape(-1, config.head_dim, *stored.shape[1:])
    rotated = config.rotary_dim or config.head_dim
    return torch.cat([heads[:, 0:rotated:2], heads[:, 1:rotated:2], heads[:, rotated:]], dim=1).flatten(0, 1)


def interleaved_gate_up(stored: Tensor, config: ModelConfig) -> Tensor:
    """[in, out] or [out], gate and up taking turns (GPT-OSS) -> all of gate, then all of up."""
    rows = stored if stored.dim() == 1 else stored.transpose(0, 1)
    return torch.cat([rows[0::2], rows[1::2]])


def from_third_row(stored: Tensor, config: ModelConfig) -> Tensor:
    """OPT's table of positions begins with two that no token has."""
    return stored[2:]


def one_row(stored: Tensor, config: ModelConfig) -> Tensor:
    """[in] -> [1, in]."""
    return stored.reshape(1, -1)


LAYOUTS: dict[str, Layout] = {
    layout.__name__: layout
    for layout in (transposed, plus_one, grouped_qkv, paired_rotary, interleaved_gate_up, from_third_row, one_row)
}
ROW_ORDERS = frozenset({"grouped_qkv", "paired_rotary"})  # these move whole rows, so quantized matrices can follow
