"""Captured decode steps: which sizes there are, what padding looks like, and that a replay says what an eager one says.

The capture is a stand-in that computes again what a graph would replay; all else is what runs on a GPU.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.model.fake_cuda import BLOCK, fake_cuda, fake_executor
from tests.model.generation import generate
from tests.model.transformer.test_fake_cuda import CONFIGS, CONTEXT
from tests.model.weights.networks import saved_llama
from tokenrelay.model.config import EngineConfig
from tokenrelay.model.engine.engine import Engine
from tokenrelay.model.engine.executor import EagerExecutor, StepInputs
from tokenrelay.model.engine.graphs import GraphExecutor, Replay, batch_sizes, padded
from tokenrelay.model.engine.request import Request
from tokenrelay.model.sampling_params import SamplingParams
from tokenrelay.model.transformer.kernels import native
from tokenrelay.model.weights.safetensors import SafetensorsCheckpoint

CPU = torch.device("cpu")
CONFIG = EngineConfig(num_blocks=64, max_num_seqs=5, num_speculative_tokens=0)


@pytest.mark.parametrize("largest", range(1, 70))
def test_every_number_of_requests_has_a_size_at_most_twice_as_large(largest: int) -> None:
    sizes = batch_sizes(largest)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == largest
    for num_seqs in range(1, largest + 1):
        assert min(size for size in sizes if size >= num_seqs) < 2 * num_seqs


def decode_step(num_seqs: int, width: int) -> StepInputs:
    ids = np.arange(1, num_seqs + 1, dtype=np.int64)
    tables = np.arange(num_seqs * width, dtype=np.int32).reshape(num_seqs, width)
    starts = np.arange(num_seqs + 1, dtype=np.int32)
    lens = (ids + 11).astype(np.int32)
    return StepInputs(ids, ids + 10, ids + 100, tables, starts, lens, np.ones(num_seqs, dtype=np.int32))


def test_padding_is_one_token_per_request_written_nowhere() -> None:
    step = padded(decode_step(3, 2), 8, 5)
    assert step.is_decode
    assert step.input_ids.tolist() == [1, 2, 3, 0, 0, 0, 0, 0]
    assert step.slot_mapping.tolist() == [101, 102, 103, -1, -1, -1, -1, -1]
    assert step.seq_lens.tolist() == [12, 13, 14, 1, 1, 1, 1, 1]
    assert step.query_start_loc.tolist() == list(range(9))
    assert step.block_tables[:3].tolist() == [[0, 1, 0, 0, 0], [2, 3, 0, 0, 0], [4, 5, 0, 0, 0]]
    assert not step.block_tables[3:].any()


def test_all_inputs_travel_in_one_buffer_and_arrive_as_they_were() -> None:
    step = decode_step(3, 2)
    ids, positions, metadata = step.unpacked(step.packed())
    arrived = (ids, positions, metadata.slot_mapping, metadata.block_tables, metadata.query_start_loc)
    for tensor, array in zip((*arrived, metadata.seq_lens), step[:6], strict=True):
        assert array is not None
        assert np.array_equal(tensor.numpy(), array)
        assert tensor.numpy().dtype == array.dtype
    assert metadata.sink_positions is None


class Recorder:
    """Stands in for CUDA: a replay computes again. ``replays`` are the sizes."""

    def __init__(self) -> None:
        self.replays: list[int] = []

    def __call__(self, run: Replay) -> Replay:
        def replay() -> torch.Tensor:
            hidden = run()
            self.replays.append(len(hidden))
            return hidden

        return replay


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
    path = saved_llama(tmp_path_factory.mktemp("tiny"), **heads, **sizes, initializer_range=0.3)
    return Engine.from_checkpoint(SafetensorsCheckpoint(path), CONFIG, dtype=torch.float32, device=CPU)


def requests() -> list[Request]:
    return [
        Request(
            str(i), [3 + (i * j) % 60 for j in range(1, 6 + i)], SamplingParams(max_tokens=4 + 3 * i, temperature=0)
        )
        for i in range(4)
    ]


@pytest.mark.skipif(not native.is_available(), reason="stock torch products depend on the batch")
def test_replayed_steps_give_the_ids_of_eager_ones(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate(engine, requests())
    runner, recorder = engine.runner, Recorder()
    eager = runner.executor
    assert isinstance(eager, EagerExecutor)
    replaying = GraphExecutor(eager, recorder, max_num_seqs=CONFIG.max_num_seqs, max_blocks=4)
    monkeypatch.setattr(runner, "executor", replaying)
    assert generate(engine, requests()) == expected
    assert set(recorder.replays) == {1, 2, 4}  # as requests end; prompts are computed eagerly


def test_only_a_decode_step_that_the_network_takes_as_always_is_replayed(engine: Engine) -> None:
    recorder = Recorder()
    eager = engine.runner.executor
    assert isinstance(eager, EagerExecutor)
    executor = GraphExecutor(eager, recorder, max_num_seqs=2, max_blocks=4)
    ids = np.zeros(2, dtype=np.int64)
    tables, lens = np.zeros((1, 1), dtype=np.int32), np.array([2], dtype=np.int32)
    with torch.inference_mode():
        starts, results = np.array([0, 2], dtype=np.int32), np.array([1], dtype=np.int32)
        executor.forward(StepInputs(ids, ids, ids, tables, starts, lens, results))  # a prompt
        executor.forward(decode_step(3, 2)._replace(block_tables=np.zeros((3, 2), dtype=np.int32)))  # too many
        executor.forward(decode_step(2, 2)._replace(block_tables=np.zeros((2, 2), dtype=np.int32)), capturable=False)
        assert recorder.replays == []
        executor.forward(decode_step(2, 2)._replace(block_tables=np.zeros((2, 2), dtype=np.int32)))
        assert recorder.replays == [2]


@pytest.mark.parametrize("name", ["llama", "gemma 2"])
def test_a_padded_step_on_a_gpu_that_is_not_there(name: str) -> None:
    with fake_cuda():
        eager = fake_executor(CONFIGS[name], torch.bfloat16, CONTEXT)
        executor = GraphExecutor(eager, lambda run: run, max_num_seqs=8, max_blocks=-(-CONTEXT // BLOCK))
        hidden = executor.forward(decode_step(5, 2))
    assert (tuple(hidden.shape), hidden.dtype, hidden.device.type) == ((5, 128), torch.bfloat16, "cuda")
