"""The engine alone as a target of ``tokenrelay bench``: what processes, queue and HTTP take from it.

``tokenrelay bench ours=URL engine="exec:.venv/bin/python -m benchmarks.engine_peer" --clients 32 --requests 32``
"""

from __future__ import annotations

import argparse
import sys
import time

import msgspec
import torch

from tokenrelay.bench.measured import Measured, Run
from tokenrelay.model.engine.engine import Engine
from tokenrelay.model.engine.request import Request
from tokenrelay.model.sampling_params import SamplingParams
from tokenrelay.model.transformer.kernels import native


class Workload(msgspec.Struct):
    """What ``tokenrelay bench`` hands over. Prompts are token ids."""

    clients: int
    prompts: list[list[int]]
    max_tokens: int
    warm_up: list[list[int]]


def closed_loop(engine: Engine, prompts: list[list[int]], clients: int, max_tokens: int) -> Run:
    """Keeps so many requests in flight."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    waiting, running, ended = iter(enumerate(prompts)), dict[str, Measured](), list[Measured]()
    begin = time.perf_counter()
    while True:
        while len(running) < clients and (prompt := next(waiting, None)) is not None:
            request_id = str(prompt[0])
            running[request_id] = Measured(time.perf_counter(), prompt_tokens=len(prompt[1]))
            engine.add(Request(request_id, prompt[1], params))
        if not running:
            return Run(ended, time.perf_counter() - begin)
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            request = running[output.request_id]
            request.arrivals.append(now)
            request.output_tokens += len(output.token_ids)
            request.ended = now
            if output.finish_reason:
                ended.append(running.pop(output.request_id))


def main() -> None:
    """Warm up, then measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    options = parser.parse_args()
    workload = msgspec.json.decode(sys.stdin.buffer.read(), type=Workload)
    if native.is_available():
        torch.set_num_threads(1)  # the kernels have the cores, as in a worker
    engine = Engine.from_model(options.model)
    closed_loop(engine, workload.warm_up, workload.clients, workload.max_tokens)
    run = closed_loop(engine, workload.prompts, workload.clients, workload.max_tokens)
    sys.stdout.buffer.write(msgspec.json.encode(run) + b"\n")


if __name__ == "__main__":
    main()
