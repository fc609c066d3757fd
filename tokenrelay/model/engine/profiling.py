"""The largest step there can be, run once to see what memory it takes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tokenrelay.model.config import EngineConfig
from tokenrelay.model.engine.device_memory import MemoryUsage
from tokenrelay.model.engine.request import Request
from tokenrelay.model.engine.step import ScheduledRequest, SchedulerOutput
from tokenrelay.model.sampling_params import SamplingParams

PARAMS = SamplingParams(max_tokens=1, temperature=1.0, top_p=0.9)  # a sort of the whole vocabulary


def largest_step(config: EngineConfig, context: int) -> SchedulerOutput:
    """``max_num_batched_tokens`` tokens of ``max_num_seqs`` requests that all sample, of no more than ``context``
    tokens each. All of them lie in block 0."""
    budget, num_seqs = config.max_num_batched_tokens, config.max_num_seqs
    scheduled = []
    for index in range(num_seqs):
        num_tokens = min(context, budget // num_seqs + (index < budget % num_seqs))
        request = Request(f"profile-{index}", [0] * num_tokens, PARAMS)
        request.block_table = [0] * -(-num_tokens // config.block_size)
        scheduled.append(ScheduledRequest(request, num_tokens))
    return SchedulerOutput(scheduled)


def measure(run: Callable[[], object], device: torch.device) -> MemoryUsage:
    """What ``run`` takes of a CUDA device, and what is left when it is over."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    activations = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    return MemoryUsage(total, free, activations)
