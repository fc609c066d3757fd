"""A network over several ranks writes what it writes as one: every rank here is a thread with its own gloo group."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.generation import generate
from tests.model.weights.networks import saved_llama
from tokenrelay.model.config import EngineConfig, Quantization
from tokenrelay.model.engine.engine import Engine
from tokenrelay.model.engine.ranks import follow
from tokenrelay.model.engine.request import Request
from tokenrelay.model.sampling_params import SamplingParams
from tokenrelay.model.transformer.communicator import Communicator, RankLost
from tokenrelay.model.weights.safetensors import SafetensorsCheckpoint

CPU = torch.device("cpu")
NUM_TOKENS = 64
PROMPTS = [range(3, 40), [5, 6, 7, 8] * 6, range(3, 36), [9, 9, 4] * 5, [8, 8, 8]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> SafetensorsCheckpoint:
    folder = tmp_path_factory.mktemp("tiny")
    saved_llama(folder, intermediate_size=128, max_position_embeddings=256, initializer_range=0.1)
    return SafetensorsCheckpoint(folder)


class Followers:
    """The ranks behind the leader; ``ended`` is what each ended with."""

    def __init__(self, checkpoint: SafetensorsCheckpoint, rendezvous: Path, size: int, **how: Any) -> None:
        self.ended: list[type[BaseException]] = []
        self._threads = [
            threading.Thread(target=self._follow, args=(checkpoint, rendezvous, rank, size, how), daemon=True)
            for rank in range(1, size)
        ]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def _follow(
        self, checkpoint: SafetensorsCheckpoint, rendezvous: Path, rank: int, size: int, how: dict[str, Any]
    ) -> None:
        try:
            ranks = Communicator(rendezvous, rank, size, CPU)
            follow(load(checkpoint, ranks, **how).runner.executor, ranks)
        except BaseException as error:
            self.ended.append(type(error))  # with its traceback it would keep the connections open


def load(
    checkpoint: SafetensorsCheckpoint,
    ranks: Communicator | None,
    *,
    num_blocks: int = 64,
    quantization: Quantization = "none",
) -> Engine:
    """Prompts come in chunks."""
    config = EngineConfig(num_blocks=num_blocks, max_num_seqs=8, max_num_batched_tokens=32)
    return Engine.from_checkpoint(
        checkpoint, config, dtype=torch.float32, device=CPU, ranks=ranks, quantization=quantization
    )


@contextmanager
def divided(checkpoint: SafetensorsCheckpoint, rendezvous: Path, size: int = 2, **how: Any) -> Iterator[Engine]:
    followers = Followers(checkpoint, rendezvous, size, **how)
    ranks = Communicator(rendezvous, 0, size, CPU)
    try:
        yield load(checkpoint, ranks, **how)
    finally:
        ranks.close()
        followers.join()
    assert followers.ended == [RankLost] * (size - 1)


def requests(name: str, prompts: Sequence[Sequence[int]] = PROMPTS, max_tokens: int = NUM_TOKENS) -> list[Request]:
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    return [Request(f"{name} {i}", tuple(prompt), params) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("num_blocks", [64, 14], ids=["plenty", "preemption"])
def test_two_ranks_write_what_one_writes(checkpoint: SafetensorsCheckpoint, tmp_path: Path, num_blocks: int) -> None:
    """Several requests at a time, in chunks, with prefix hits."""
    whole = load(checkpoint, None, num_blocks=num_blocks)
    expected = generate(whole, requests("first")) | generate(whole, requests("again"))
    with divided(checkpoint, tmp_path / "store", num_blocks=num_blocks) as engine:
        found = generate(engine, requests("first")) | generate(engine, requests("again"))
        assert (engine.scheduler.num_preemptions > 0) == (num_blocks == 14)
        assert engine.scheduler.num_prefix_hits > 0
    assert found == expected


def test_with_more_ranks_than_key_heads_a_row_does_not_depend_on_its_neighbours(
    checkpoint: SafetensorsCheckpoint, tmp_path: Path
) -> None:
    with divided(checkpoint, tmp_path / "store", size=4) as engine:
        together = [scores(engine, prompt, beside=PROMPTS) for prompt in PROMPTS]
        assert together == [scores(engine, prompt) for prompt in PROMPTS]
    whole = load(checkpoint, None)
    for prompt, found in zip(PROMPTS, together, strict=True):
        torch.testing.assert_close(found, scores(whole, prompt), rtol=0, atol=1e-4)


def test_matrices_of_8_bits_are_divided_as_well(checkpoint: SafetensorsCheckpoint, tmp_path: Path) -> None:
    """To nearly the same: activations are rounded, and another order of additions rounds some of them elsewhere."""
    whole = load(checkpoint, None, quantization="int8")
    with divided(checkpoint, tmp_path / "store", quantization="int8") as engine:
        for prompt in PROMPTS:
            torch.testing.assert_close(scores(engine, prompt), scores(whole, prompt), rtol=0, atol=0.05)


def scores(engine: Engine, prompt: Sequence[int], beside: Sequence[Sequence[int]] = ()) -> list[float]:
    """Log-probabilities of the prompt's tokens, alone or in a batch."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    for request in [Request("scored", tuple(prompt), params), *requests("beside", beside, 2)]:
        engine.add(request)
    found: list[float] = []
    while engine.has_work:
        for output in engine.step():
            found += [told.logprob for told in output.prompt_logprobs if told] if output.request_id == "scored" else []
    return found
