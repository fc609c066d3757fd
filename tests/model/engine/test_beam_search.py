"""Beam search finds what transformers' finds, over an engine that only knows single sequences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.model.weights.networks import tiny_llama
from tokenrelay.model.config import EngineConfig
from tokenrelay.model.engine.beam_search import BeamSearch, Hypothesis
from tokenrelay.model.engine.engine import Engine
from tokenrelay.model.engine.request import Request
from tokenrelay.model.sampling_params import FinishReason, SamplingParams
from tokenrelay.model.weights.safetensors import SafetensorsCheckpoint

CPU = torch.device("cpu")
EOS = 2
PROMPT = [5, 9, 3, 14, 8, 7, 11, 5, 9, 3, 1, 4, 4, 12, 6, 10, 13, 5]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    """A small vocabulary, so that sequences end now and then."""
    model = tiny_llama(
        tie=False, seed=1, vocab_size=16, eos_token_id=EOS, pad_token_id=0, initializer_range=0.15
    ).eval()
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    return model, folder


def search(engine: Engine, params: SamplingParams, others: int = 0) -> list[Hypothesis]:
    """To its end, beside ``others`` that sample."""
    for i in range(others):
        engine.add(Request(f"other {i}", [i + 3] * 9, SamplingParams(max_tokens=20, seed=i, ignore_eos=True)))
    beams = BeamSearch(Request("beams", PROMPT, params), [EOS])
    requests = beams.start()
    while beams.hypotheses is None:
        for request in requests:
            engine.add(request)
        requests = []
        for output in engine.step():
            if output.request_id.startswith("beams"):
                requests += beams.process(output)
    return beams.hypotheses


def make_engine(folder: Path, num_blocks: int = 64) -> Engine:
    config = EngineConfig(num_blocks=num_blocks, max_num_batched_tokens=64)
    return Engine.from_checkpoint(SafetensorsCheckpoint(folder), config, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("width", [1, 4, 7])
def test_the_hypotheses_are_those_of_transformers(
    theirs: tuple[LlamaForCausalLM, Path], width: int, length_penalty: float, early_stopping: bool
) -> None:
    model, folder = theirs
    expected = model.generate(
        torch.tensor([PROMPT]),
        max_new_tokens=14,
        do_sample=False,
        num_beams=width,
        num_return_sequences=width,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        output_scores=True,
        return_dict_in_generate=True,
    )
    params = SamplingParams(
        max_tokens=14, n=width, beam_width=width, length_penalty=length_penalty, early_stopping=early_stopping
    )
    found = search(make_engine(folder), params)
    assert len(found) == width
    for hypothesis, sequence in zip(found, expected.sequences.tolist(), strict=True):
        generated = sequence[len(PROMPT) :]
        assert list(hypothesis.token_ids) == generated[: len(hypothesis.token_ids)]
        assert set(generated[len(hypothesis.token_ids) :]) <= {0, EOS}  # padding
        assert (hypothesis.finish_reason is FinishReason.STOP) == (hypothesis.token_ids[-1] == EOS)
    if width > 1:
        assert [h.score for h in found] == pytest.approx(expected.sequences_scores.tolist(), abs=1e-4)


def test_a_round_computes_one_token_per_beam(theirs: tuple[LlamaForCausalLM, Path]) -> None:
    engine = make_engine(theirs[1])
    search(engine, SamplingParams(max_tokens=10, beam_width=4, ignore_eos=True))
    assert engine.scheduler.num_scheduled_tokens == len(PROMPT) + 9 * 4
    engine.scheduler.check_integrity()
    assert engine.scheduler.block_pool.usage == 0


def test_neighbours_and_evictions_change_nothing(theirs: tuple[LlamaForCausalLM, Path]) -> None:
    params = SamplingParams(max_tokens=14, n=4, beam_width=4)
    alone = search(make_engine(theirs[1]), params)
    crowded = make_engine(theirs[1], num_blocks=8)
    assert search(crowded, params, others=6) == alone
    assert crowded.scheduler.num_preemptions > 0


def test_the_best_n_are_kept(theirs: tuple[LlamaForCausalLM, Path]) -> None:
    params = SamplingParams(max_tokens=14, n=4, beam_width=4)
    all_of_them = search(make_engine(theirs[1]), params)
    assert search(make_engine(theirs[1]), replace(params, n=2)) == all_of_them[:2]
