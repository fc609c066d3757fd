"""Penalties, biases and bans: exact against plain Python, honoured by greedy rows, never mixing rows."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.engine.drawing import draw
from tokenrelay.model.engine import logits_processors
from tokenrelay.model.engine.logits_processors import LogitsProcessor, process
from tokenrelay.model.engine.request import Request, SamplingPosition
from tokenrelay.model.sampling_params import SamplingParams

VOCABULARY = 40
EVERYTHING: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.7, "frequency_penalty": -0.4},
    {"logit_bias": ((3, 4.5), (5, -100.0))},
    {"allowed_token_ids": (2, 3, 5, 7, 11)},
    {"bad_words": ((1,), (2, 3), (4, 5, 6))},
    {"dry_multiplier": 0.8, "dry_sequence_breakers": (0, 9)},
    {"dry_multiplier": 2.0, "dry_base": 1.2, "dry_allowed_length": 1, "dry_penalty_last_n": 10},
    {"min_p": 0.05, "xtc_probability": 0.5, "xtc_threshold": 0.05},
    {"typical_p": 0.8, "top_n_sigma": 2.0},
    {"dynatemp_range": 0.9, "dynatemp_exponent": 1.5, "temperature": 1.0, "top_p": 0.9},
    {"top_k": 20, "typical_p": 0.9, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
]


def request(prompt: list[int], output: list[int], **params: Any) -> Request:
    return Request("r", prompt, SamplingParams(max_tokens=999, **params), output_token_ids=output)


def random_request(rng: random.Random, params: dict[str, Any], tokens: int = 8) -> Request:
    """Few distinct tokens, so that everything repeats."""
    prompt = [rng.randrange(tokens) for _ in range(rng.randint(1, 30))]
    output = [rng.randrange(tokens) for _ in range(rng.randint(0, 30))]
    return request(prompt, output, seed=rng.randrange(2**63), **params)


def processed(logits: Tensor, one: Request) -> Tensor:
    logits = logits.clone().unsqueeze(0)
    process(logits, [SamplingPosition(one)])
    return logits[0]


def fp32(number: float) -> float:
    return torch.tensor(number, dtype=torch.float32).item()


def test_penalties_are_those_of_plain_python() -> None:
    rng = random.Random(1)
    torch.manual_seed(1)
    for _ in range(50):
        logits = torch.randn(VOCABULARY)
        one = random_request(rng, {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": -0.4})
        expected = logits.clone()
        for token in set(one.token_ids):
            factor = torch.tensor(1.3)
            expected[token] = expected[token] / factor if expected[token] > 0 else expected[token] * factor
        for token in set(one.output_token_ids):
            expected[token] -= fp32(0.7 - 0.4 * one.output_token_ids.count(token))
        assert torch.equal(processed(logits, one), expected)


def slow_dry(ids: list[int], params: SamplingParams) -> dict[int, float]:
    """The first implementation's loop, over every earlier place and token by token."""
    if params.dry_penalty_last_n >= 0:
        ids = ids[len(ids) - min(params.dry_penalty_last_n, len(ids)) :]
    longest: dict[int, int] = {}
    for end in range(len(ids) - 1):
        length = 0
        while length <= end and ids[end - length] == ids[-1 - length] not in params.dry_sequence_breakers:
            length += 1
        if length and ids[end + 1] not in params.dry_sequence_breakers:
            longest[ids[end + 1]] = max(longest.get(ids[end + 1], 0), length)
    allowed = params.dry_allowed_length
    return {i: params.dry_multiplier * params.dry_base ** (n - allowed) for i, n in longest.items() if n >= allowed}


def test_dry_is_that_of_plain_python() -> None:
    rng = random.Random(2)
    logits = torch.zeros(VOCABULARY)
    punished = 0
    for case in range(200):
        one = random_request(rng, EVERYTHING[6 + case % 2], tokens=3 + case % 4)
        expected = slow_dry(one.token_ids, one.params)
        punished += bool(expected)
        assert processed(logits, one).tolist() == [fp32(-expected.get(i, 0.0)) for i in range(VOCABULARY)]
    assert punished > 100


def test_dry_punishes_only_what_prolongs_a_repeat() -> None:
    one = request([5, 6, 7, 8, 1], [5, 6, 7], dry_multiplier=1.0, dry_base=2.0, dry_allowed_length=2)
    assert processed(torch.zeros(10), one).tolist() == [0, 0, 0, 0, 0, 0, 0, 0, -2.0, 0]


def test_dry_stays_finite_in_an_endless_loop() -> None:
    one = request([1] * 500, [], dry_multiplier=100.0, dry_base=100.0, temperature=0)
    assert processed(torch.zeros(10), one).isfinite().all()
    assert draw(torch.eye(10)[1:2], [one]) == [0]


def test_a_bias_is_added() -> None:
    logits = torch.arange(10.0)
    changed = processed(logits, request([1], [], logit_bias=((3, 4.5), (9, -100.0))))
    assert (changed - logits).tolist() == [0, 0, 0, 4.5, 0, 0, 0, 0, 0, -100]


@pytest.mark.parametrize(
    ("prompt", "output", "banned"),
    [([9], [], [1]), ([9], [2], [1, 3]), ([2], [], [1]), ([9], [5, 4], [1]), ([9], [4, 5], [1, 6]), ([4], [5], [1])],
)
def test_a_bad_word_cannot_be_completed_in_the_output(prompt: list[int], output: list[int], banned: list[int]) -> None:
    changed = processed(torch.zeros(10), request(prompt, output, bad_words=((1,), (2, 3), (4, 5, 6))))
    assert changed.isneginf().nonzero().flatten().tolist() == banned


def test_only_allowed_tokens_come_even_when_all_of_them_are_bad_words() -> None:
    assert processed(torch.ones(6), request([1], [], allowed_token_ids=(2, 4))).isfinite().tolist() == [
        *(False, False, True, False, True, False)
    ]
    both = request([1], [], allowed_token_ids=(2, 4), bad_words=((2,), (4,)))
    assert draw(torch.ones(1, 6), [both])[0] in (2, 4)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, 3),
        ({"repetition_penalty": 2.0}, 2),
        ({"presence_penalty": 1.5}, 2),
        ({"frequency_penalty": 1.5}, 2),
        ({"logit_bias": ((0, 50.0),)}, 0),
        ({"allowed_token_ids": (0, 1)}, 1),
        ({"bad_words": ((3,),)}, 2),
        ({"dry_multiplier": 5.0}, 2),
        ({"top_k": 1, "min_p": 1.0, "xtc_probability": 1.0, "typical_p": 0.1}, 3),
    ],
)
def test_greedy_rows_honour_all_that_changes_logits(params: dict[str, Any], expected: int) -> None:
    one = request([1, 2, 3, 1, 2, 3], [1, 2, 3, 1, 2], temperature=0, **params)
    logits = torch.tensor([[0.0, 1.5, 2.0, 2.1]])
    if "repetition_penalty" in params or "frequency_penalty" in params or "presence_penalty" in params:
        one = request([3], [3], temperature=0, **params)
    assert draw(logits, [one]) == [expected]


@pytest.mark.parametrize("vocabulary", [VOCABULARY, 40_000])
def test_a_row_s_token_does_not_depend_on_the_other_rows(vocabulary: int) -> None:
    """40 000: torch splits long sums of a lone row among threads."""
    rng = random.Random(3)
    torch.manual_seed(3)
    requests = [random_request(rng, params) for params in EVERYTHING * 3]
    logits = torch.randn(len(requests), vocabulary) * 2
    together = draw(logits.clone(), requests)
    alone = [draw(row.unsqueeze(0).clone(), [r])[0] for row, r in zip(logits, requests, strict=True)]
    assert together == alone


def test_a_resumed_request_draws_the_same_next_token() -> None:
    rng = random.Random(4)
    torch.manual_seed(4)
    for params in EVERYTHING:
        table = torch.randn(64, VOCABULARY) * 2  # a network that knows only the position
        whole = request([1, 2, 3], [], seed=rng.randrange(2**63), **params)
        while whole.num_tokens < 40:
            whole.token_ids += draw(table[whole.num_tokens].clone().unsqueeze(0), [whole])
        for split in range(37):
            resumed = Request("r", [1, 2, 3], whole.params, output_token_ids=whole.output_token_ids[:split])
            logits = table[resumed.num_tokens].clone().unsqueeze(0)
            assert draw(logits, [resumed]) == [whole.output_token_ids[split]]


def test_a_batch_that_uses_none_pays_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    counting = tuple(
        LogitsProcessor(p.is_used, lambda logits, rows: calls.extend(row for row, _ in rows))
        for p in logits_processors.PROCESSORS
    )
    monkeypatch.setattr(logits_processors, "PROCESSORS", counting)
    plain = request([1], [2])
    draw(torch.randn(8, VOCABULARY), [plain] * 8)
    assert calls == []
    draw(torch.randn(3, VOCABULARY), [plain, request([1], [2], presence_penalty=1.0), plain])
    assert calls == [1]
