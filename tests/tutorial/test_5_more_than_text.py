"""What else a request can ask for: how likely its tokens are, the best of several answers, the search for the best."""

from __future__ import annotations

import math

import httpx
import openai
import pytest

from tests.service.running import MODEL, RunningService

START = "One, two, three, four,"


def test_how_likely_each_token_was(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=START, max_tokens=4, temperature=0, logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == answer.choices[0].text
    for token, logprob, best in zip(
        logprobs.tokens or [], logprobs.token_logprobs or [], logprobs.top_logprobs or [], strict=True
    ):
        assert len(best) == 3
        assert logprob == max(best.values()) == best[token]  # greedy: the likeliest was taken


def test_score_a_text_without_continuing_it(client: openai.OpenAI) -> None:
    def score(text: str) -> float:
        answer = client.completions.create(model=MODEL, prompt=text, max_tokens=0, echo=True, logprobs=0)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert answer.choices[0].text == text
        return math.fsum((logprobs.token_logprobs or [])[1:])

    assert score("The capital of France is Paris.") > score("The capital of France is Tulips.")


def test_a_token_s_probability_is_the_same_generated_or_scored(client: openai.OpenAI) -> None:
    made = client.completions.create(model=MODEL, prompt=START, max_tokens=6, temperature=0, logprobs=0).choices[0]
    whole = client.completions.create(model=MODEL, prompt=START + made.text, max_tokens=0, echo=True, logprobs=0)
    assert made.logprobs is not None
    assert whole.choices[0].logprobs is not None
    scored = (whole.choices[0].logprobs.token_logprobs or [])[-6:]
    assert scored == made.logprobs.token_logprobs


def test_the_best_of_several(client: openai.OpenAI) -> None:
    params = {"model": MODEL, "prompt": "My favourite animal is", "max_tokens": 8, "seed": 5}
    several = client.completions.create(**params, n=4, logprobs=0)  # type: ignore[call-overload]
    best = client.completions.create(**params, n=1, best_of=4)  # type: ignore[call-overload]
    means = {c.text: math.fsum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in several.choices}
    assert best.choices[0].text == max(means, key=lambda text: means[text])
    assert best.usage.completion_tokens == several.usage.completion_tokens


def test_beam_search_finds_what_is_likelier_than_greedy(service: RunningService) -> None:
    def ask(**more: object) -> list[str]:
        body = {"model": MODEL, "prompt": "The weather today", "max_tokens": 8, **more}
        answer = httpx.post(f"{service.url}/v1/completions", json=body, timeout=60).raise_for_status().json()
        return [choice["text"] for choice in answer["choices"]]

    def score(text: str) -> float:
        body = {"model": MODEL, "prompt": "The weather today" + text, "max_tokens": 0, "echo": True, "logprobs": 0}
        answer = httpx.post(f"{service.url}/v1/completions", json=body, timeout=60).raise_for_status().json()
        return math.fsum(answer["choices"][0]["logprobs"]["token_logprobs"][-8:])

    beams = ask(use_beam_search=True, n=4, ignore_eos=True)
    assert len(set(beams)) == 4
    assert [score(text) for text in beams] == sorted((score(text) for text in beams), reverse=True)
    assert score(beams[0]) >= score(ask(temperature=0, ignore_eos=True)[0])


@pytest.mark.parametrize("params", [{"mirostat": 2, "mirostat_tau": 3.0}, {"min_p": 0.1, "dry_multiplier": 0.8}])
def test_samplers_of_other_servers(service: RunningService, params: dict[str, float]) -> None:
    body = {"model": MODEL, "prompt": START, "max_tokens": 12, "seed": 3, **params}
    answers = [httpx.post(f"{service.url}/v1/completions", json=body, timeout=60).json() for _ in range(2)]
    assert answers[0]["choices"][0]["text"] == answers[1]["choices"][0]["text"] != ""


def test_token_ids_in_and_out(service: RunningService) -> None:
    body = {"model": MODEL, "prompt": START, "max_tokens": 4, "temperature": 0, "return_token_ids": True}
    first = httpx.post(f"{service.url}/v1/completions", json=body, timeout=60).json()["choices"][0]
    again = body | {"prompt": first["prompt_token_ids"] + first["token_ids"][:2], "max_tokens": 2}
    second = httpx.post(f"{service.url}/v1/completions", json=again, timeout=60).json()["choices"][0]
    assert second["token_ids"] == first["token_ids"][2:]
