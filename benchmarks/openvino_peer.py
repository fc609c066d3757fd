"""OpenVINO GenAI as a target of ``tokenrelay bench``: no server, so it is measured in this process.

``tokenrelay bench ours=URL openvino="exec:VENV/bin/python benchmarks/openvino_peer.py FOLDER"``; that environment has
``openvino-genai`` and nothing of tokenrelay, the folder is from ``optimum-cli export openvino --weight-format int8``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import openvino
import openvino_genai


@dataclass
class Request:
    """As ``tokenrelay bench`` wants it back."""

    started: float
    prompt_tokens: int
    ended: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    output_tokens: int = 0


class Peer:
    """A warm pipeline with continuous batching."""

    def __init__(self, folder: str, threads: int, cache_gb: int, prefix_caching: bool) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size, scheduler.enable_prefix_caching = cache_gb, prefix_caching
        options = {"INFERENCE_NUM_THREADS": threads}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", options)
        self._tokenizer = self._pipeline.get_tokenizer()
        self._num_added = 0

    def closed_loop(self, prompts: list[Any], clients: int, max_tokens: int) -> dict[str, Any]:
        """Keeps so many requests in flight."""
        inputs = iter([self._ids(prompt) for prompt in prompts])
        started, requests, running = time.perf_counter(), list[Request](), list[tuple[Request, Any]]()
        while self._refill(running, inputs, clients, max_tokens):
            self._pipeline.step()
            now = time.perf_counter()
            for request, handle in running:
                self._read(request, handle, now)
            requests += [request for request, _ in running if request.output_tokens >= max_tokens]
            running = [pair for pair in running if pair[0].output_tokens < max_tokens]
        return {"requests": [asdict(request) for request in requests], "seconds": time.perf_counter() - started}

    def _refill(self, running: list[tuple[Request, Any]], inputs: Iterator[Any], clients: int, max_tokens: int) -> bool:
        while len(running) < clients and (ids := next(inputs, None)) is not None:
            request = Request(time.perf_counter(), ids.shape[1])
            running.append((request, self._add(ids, max_tokens)))
        return bool(running)

    def _add(self, ids: Any, max_tokens: int) -> Any:
        config = openvino_genai.GenerationConfig(max_new_tokens=max_tokens, ignore_eos=True, do_sample=False)
        self._num_added += 1
        return self._pipeline.add_request(self._num_added, openvino.Tensor(ids), config)

    def _read(self, request: Request, handle: Any, now: float) -> None:
        while handle.can_read():
            num_tokens = sum(len(output.generated_ids) for output in handle.read().values())
            request.arrivals += [now] * bool(num_tokens)
            request.output_tokens += num_tokens
            request.ended = now

    def _ids(self, prompt: Any) -> Any:
        ids = self._tokenizer.encode(prompt).input_ids.data if isinstance(prompt, str) else [prompt]
        return np.array(ids, dtype=np.int64)


def main() -> None:
    """Warm up, then measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache-gb", type=int, default=1, help="memory for keys and values")
    parser.add_argument("--prefix-caching", action="store_true", help="for workloads with --shared-prefix")
    options = parser.parse_args()
    workload = json.load(sys.stdin)
    peer = Peer(options.model_folder, options.threads, options.cache_gb, options.prefix_caching)
    peer.closed_loop(workload["warm_up"], workload["clients"], workload["max_tokens"])
    print(json.dumps(peer.closed_loop(workload["prompts"], workload["clients"], workload["max_tokens"])))


if __name__ == "__main__":
    main()
