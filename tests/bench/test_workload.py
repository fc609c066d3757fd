"""Prompts are as long as was asked, new every time, and of text where a text is wanted."""

from __future__ import annotations

import json
import random

import pytest

from tokenrelay.bench.workload import Workload
from tokenrelay.service.api.served_model import ServedModel


@pytest.mark.parametrize(("shared", "own", "vocabulary"), [(0, 5, 10), (7, 5, 2000), (100, 1, 30_000)])
def test_random_prompts(shared: int, own: int, vocabulary: int) -> None:
    workload = Workload(prompt_tokens=own, shared_prefix=shared, vocabulary=vocabulary)
    one, other = (workload.prompt(random.Random(seed)) for seed in (1, 2))
    assert len(one) == len(other) == shared + own
    assert one[:shared] == other[:shared]
    assert one[shared:] != other[shared:]
    assert max(map(int, one)) < vocabulary


@pytest.mark.parametrize("length", [100, 500, 2000])
def test_a_text_is_about_as_long_as_asked(length: int, loaded_model: ServedModel) -> None:
    prompt = Workload(repetitive=True, prompt_tokens=length).prompt(random.Random(0))
    assert isinstance(prompt, str)
    assert len(loaded_model.tokenizer.encode(prompt, add_special_tokens=False)) == pytest.approx(length, rel=0.15)


def test_a_text_begins_again_at_its_end() -> None:
    one, other = (str(Workload(repetitive=True).prompt(random.Random(seed))) for seed in (1, 2))
    beginning = one.rpartition("\n\n")[2]
    assert one.startswith(beginning)
    assert not other.startswith(beginning)


def test_the_request_is_openais() -> None:
    body = json.loads(Workload(output_tokens=9).body("m", [1, 2]))
    assert body["stream_options"] == {"include_usage": True}
    assert (body["model"], body["prompt"], body["max_tokens"], body["ignore_eos"]) == ("m", [1, 2], 9, True)
    assert "ignore_eos" not in json.loads(Workload(ignore_eos=False).body("m", "Hello"))


def test_how_many_requests() -> None:
    assert Workload(clients=3).num_requests == 12
    assert Workload(clients=3, requests=5).num_requests == Workload(rate=2, requests=5).num_requests == 5
    assert Workload(rate=2).num_requests == 60
    assert Workload(rate=0.001).num_requests == 1
    assert (Workload(clients=3).num_warm_up, Workload(rate=2).num_warm_up, Workload(warm_up=0).num_warm_up) == (3, 1, 0)
