"""In a process of its own: loads a folder and prints its weights' bytes, and the most memory they ever took.

Pages of the mapped files do not count: the system takes them back when it needs them.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import torch

from tokenrelay.model.transformer.loading import load_transformer
from tokenrelay.model.transformer.quantization import keeps_stored, weight_bytes
from tokenrelay.model.weights.checkpoint import open_checkpoint
from tokenrelay.model.weights.sources import resolve


def anonymous_bytes() -> int:
    """Of this process's own memory, what is in RAM."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    [line] = [line for line in rollup.splitlines() if line.startswith("Anonymous:")]
    return int(line.split()[1]) << 10


class Watch(threading.Thread):
    """The highest value so far, looked at as often as possible."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.highest = anonymous_bytes()

    def run(self) -> None:
        while True:
            self.highest = max(self.highest, anonymous_bytes())
            time.sleep(0.002)


if __name__ == "__main__":
    folder, quantization = sys.argv[1:]
    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(resolve(folder))
    tensors = checkpoint.stored(bf16) if keeps_stored(quantization, cpu) else checkpoint.tensors(bf16)  # type: ignore[arg-type]
    watch = Watch()
    watch.start()
    start = time.perf_counter()
    model = load_transformer(
        checkpoint.config(),
        tensors,
        checkpoint.rules,
        max_model_len=64,
        dtype=bf16,
        device=cpu,
        quantization=quantization,  # type: ignore[arg-type]
    )
    watch.highest = max(watch.highest, anonymous_bytes())
    print(weight_bytes(model), watch.highest - watch.before, time.perf_counter() - start)
