"""Tensors to their places in an empty network; a matrix whose rows have all come gives way to its replacement at once.

So no more than one matrix is ever in memory in two forms, and a network of few bits never as a whole in many. Where all
matrices are replaced, on CPUs, not even one is: its tensors wait as they came, mapped from a file, until all are there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from tokenrelay.model.config import ModelConfig, Quantization
from tokenrelay.model.quantized import Quantized
from tokenrelay.model.transformer.placing import Placed, WeightsError
from tokenrelay.model.transformer.quantization import EMBEDDING, HEAD, replace_matrix
from tokenrelay.model.transformer.shards import Shards
from tokenrelay.model.transformer.transformer import Transformer


class Filling:
    """Of one network. ``quantization`` says what replaces a complete matrix; None: nothing does.

    With ``keep_quantized`` what comes in few bits stays so: its parameter is memory that is never touched.
    """

    def __init__(self, model: Transformer, quantization: Quantization | None, *, keep_quantized: bool) -> None:
        self._model, self._config = model, model.config
        self._quantization, self._keep_quantized = quantization, keep_quantized
        self._parameters = dict(model.named_parameters())  # a tied head is listed once, as the embedding
        self._missing_rows = _rows_to_fill(self._parameters, self._config)
        self._come: dict[str, set[str]] = defaultdict(set)  # which shards, by name
        self._kept: dict[str, dict[int, Tensor | Quantized]] = defaultdict(dict)  # and the row each begins at

    @torch.no_grad()
    def fill(self, tensors: Iterable[Placed]) -> None:
        """Raises WeightsError: a tensor without a place or of another shape, or a hole that is left."""
        for one in tensors:
            if one.target and not (self._config.tie_word_embeddings and one.target == f"{HEAD}.weight"):
                self._put(*one)
                if self._quantization is not None:
                    self._replace_if_complete(self._module_of(one.target))
        missing = sorted(self._described(name) for name, rows in self._missing_rows.items() if rows > 0)
        if missing:
            raise WeightsError(f"the checkpoint does not fill {', '.join(missing[:8])} ({len(missing)} in all)")

    def _put(self, name: str, target: str, shard: str, tensor: Tensor | Quantized) -> None:
        if target not in self._missing_rows:
            what = self._config.architecture
            raise WeightsError(f"tensor {name!r} has no place in a {what} network of this configuration")
        if target not in self._parameters:
            raise WeightsError(f"tensor {name!r} fills {target}, which others have filled")
        start, end = _span(self._parameters[target], shard, self._config)
        rows = self._parameters[target][start:end]
        if tensor.shape != rows.shape:
            raise WeightsError(f"tensor {name!r} has shape {list(tensor.shape)}, expected {list(rows.shape)}")
        if self._keeps(target, tensor):
            self._kept[target][start] = tensor
        else:
            rows.copy_(tensor.dequantized() if isinstance(tensor, Quantized) else tensor)
        self._missing_rows[target] -= end - start
        self._come[target].add(shard)

    def _keeps(self, target: str, tensor: Tensor | Quantized) -> bool:
        """Whether a tensor waits as it is until its matrix is replaced."""
        if isinstance(tensor, Quantized):
            matrices = ("_proj.weight", f"{HEAD}.weight", f"{EMBEDDING}.weight")
            return self._keep_quantized and target.endswith(matrices)
        replaced = self._quantization is not None and self._parameters[target].device.type == "cpu"
        module = self._model.get_submodule(self._module_of(target))
        return replaced and isinstance(module, nn.Linear) and target.endswith(".weight")

    def _described(self, target: str) -> str:
        """Of a matrix some of whose rows have come, which have not."""
        if not self._come[target]:
            return target
        shards = ("q", "k", "v") if "qkv_proj" in target else ("gate", "up")
        return f"{target} ({', '.join(shard for shard in shards if shard not in self._come[target])})"

    def _module_of(self, target: str) -> str:
        """The module that a parameter belongs to; the head, if the embedding is tied to it."""
        module = target.rpartition(".")[0]
        return HEAD if self._config.tie_word_embeddings and module == EMBEDDING else module

    def _replace_if_complete(self, module: str) -> None:
        tied = self._config.tie_word_embeddings and module == HEAD
        weight, bias = f"{EMBEDDING if tied else module}.weight", f"{module}.bias"
        if self._missing_rows.get(weight, 1) > 0 or self._missing_rows.get(bias, 0) > 0:
            return
        shards = _whole(self._kept.pop(weight, {}), self._parameters.pop(weight))
        self._parameters.pop(bias, None)
        replace_matrix(self._model, module, shards, self._quantization or "auto")


def _rows_to_fill(parameters: Mapping[str, Tensor], config: ModelConfig) -> dict[str, int]:
    """How many rows of each parameter the checkpoint has to bring; norms that do not scale are filled with ones."""
    constant = [] if config.norm_weight else [name for name in parameters if name.endswith("norm.weight")]
    for name in constant:
        parameters[name].data.fill_(1)
    return {name: parameter.shape[0] for name, parameter in parameters.items() if name not in constant}


def _whole(kept: Mapping[int, Tensor | Quantized], parameter: Tensor) -> Shards | None:
    """All of a matrix, if all of it was kept; if not, that joins the others in the parameter."""
    if kept and sum(part.shape[0] for part in kept.values()) == parameter.shape[0]:
        return Shards(kept, parameter.dtype)
    for start, part in kept.items():
        parameter.data[start : start + part.shape[0]] = part.dequantized() if isinstance(part, Quantized) else part
    return None


def _span(parameter: Tensor, shard: str, config: ModelConfig) -> tuple[int, int]:
    """The rows of a merged matrix, or bias, that a shard fills."""
    q, kv, rows = config.q_size, config.kv_size, parameter.shape[0]
    gate = rows // 2 if config.gated_mlp else 0  # experts are narrower than config.intermediate_size
    spans = {"": (0, rows), "q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}
    spans |= {"gate": (0, gate), "up": (gate, rows)}
    return spans[shard]
