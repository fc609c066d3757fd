"""What differs between devices when an engine is put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from tokenrelay.model.config import EngineConfig, ModelConfig
from tokenrelay.model.engine.device_memory import kv_cache_blocks
from tokenrelay.model.engine.executor import EagerExecutor, Executor
from tokenrelay.model.engine.graphs import CudaCapture, GraphExecutor
from tokenrelay.model.engine.model_runner import ModelRunner
from tokenrelay.model.engine.profiling import largest_step, measure
from tokenrelay.model.transformer.kv_cache import LayerCache
from tokenrelay.model.transformer.transformer import Transformer

MakeRunner = Callable[[int, EngineConfig], ModelRunner]


def check_device(device: torch.device) -> None:
    """Raises ValueError: this machine has no such device, or torch cannot use it."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, False):
        usable = ", ".join(name for name, there in available.items() if there)
        raise ValueError(f"device {device.type} is not there, or this build of torch cannot use it; usable: {usable}")


def captures(config: EngineConfig, model: ModelConfig, device: torch.device) -> bool:
    """Whether decode steps become CUDA graphs. What experts compute is as large as the data says, so theirs do not."""
    return device.type == "cuda" and not config.enforce_eager and model.experts is None


def make_executor(
    model: Transformer, kv_cache: Sequence[LayerCache], device: torch.device, config: EngineConfig, max_blocks: int
) -> Executor:
    """``max_blocks``: of one sequence."""
    eager = EagerExecutor(model, kv_cache, device)
    if not captures(config, model.config, device):
        return eager
    capture = CudaCapture(device)
    return GraphExecutor(eager, capture, max_num_seqs=config.max_num_seqs, max_blocks=max_blocks, progress=True)


def fitting_blocks(
    make_runner: MakeRunner,
    config: EngineConfig,
    model: ModelConfig,
    context: int,
    bytes_per_block: int,
    device: torch.device,
) -> int:
    """KV blocks that fit beside the weights and the largest step. Raises ValueError if none does."""
    probing = replace(config, enforce_eager=True)
    memory = measure(lambda: make_runner(1, probing).execute(largest_step(config, context)), device)
    with_graphs = captures(config, model, device)
    return kv_cache_blocks(memory, config.gpu_memory_utilization, bytes_per_block, with_graphs=with_graphs)
