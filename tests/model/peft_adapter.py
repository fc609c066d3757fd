"""Adapters as PEFT saves them, with random weights, and the same merged into a network of transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GPT2 = ("c_attn", "c_proj", "c_fc")
NEOX = ("query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h")
GPTJ = ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out")


class PeftAdapter:
    """Of every module whose name ends in one of ``targets``. ``fields`` join the configuration."""

    def __init__(
        self, model: PreTrainedModel, targets: tuple[str, ...], *, rank: int = 4, seed: int = 0, **fields: Any
    ):
        self.fields = {
            **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 6, "bias": "none"},
            **{"target_modules": list(targets), "use_dora": False, "modules_to_save": None, "lora_dropout": 0.1},
            **fields,
        }
        random = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}
        for module, in_features, out_features in _matrices(model, targets):
            for half, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
                self.tensors[f"base_model.model.{module}.lora_{half}.weight"] = 0.3 * torch.randn(
                    shape, generator=random
                )

    def save(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(self.fields))
        save_file(self.tensors, folder / "adapter_model.safetensors")
        return folder

    @torch.no_grad()
    def merge_into(self, model: PreTrainedModel) -> PreTrainedModel:
        rank = self.fields["r"]
        scale = self.fields["lora_alpha"] / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)
        for module, *_ in _matrices(model, tuple(self.fields["target_modules"])):
            a, b = (self.tensors[f"base_model.model.{module}.lora_{half}.weight"] for half in "AB")
            weight = model.get_submodule(module).weight
            change = scale * b @ a
            weight += change.T if model.config.model_type == "gpt2" else change
        return model


def _matrices(model: PreTrainedModel, targets: tuple[str, ...]) -> list[tuple[str, int, int]]:
    """Name, in and out: GPT-2's Conv1D holds them the other way round."""
    found = []
    for name, module in model.named_modules():
        if name.endswith(targets):
            rows, columns = module.weight.shape
            found.append((name, rows, columns) if model.config.model_type == "gpt2" else (name, columns, rows))
    return found
