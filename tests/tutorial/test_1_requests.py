"""What a user can ask, one thing per test. Everything is real: HTTP, Valkey, the worker, the model."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.service.running import MODEL, RunningService, wait_until

QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]


def test_ask_a_question(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"


def test_read_the_answer_while_it_is_written(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    stream = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, stream=True)
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert len([piece for piece in pieces if piece]) > 3
    assert "".join(pieces) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"]


def test_continue_a_text(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="One, two, three, four,", max_tokens=4, temperature=0)
    assert "five" in answer.choices[0].text


def test_continue_token_ids_and_several_prompts_at_once(client: openai.OpenAI) -> None:
    prompts = ["The sun rises in the", "Water freezes at"]
    answer = client.completions.create(model=MODEL, prompt=prompts, max_tokens=4, temperature=0)
    singly = [client.completions.create(model=MODEL, prompt=p, max_tokens=4, temperature=0) for p in prompts]
    assert [c.text for c in answer.choices] == [a.choices[0].text for a in singly]
    by_ids = client.completions.create(model=MODEL, prompt=[100, 200, 300], max_tokens=4)
    assert by_ids.usage is not None
    assert by_ids.usage.prompt_tokens == 3


def test_the_same_seed_gives_the_same_text(client: openai.OpenAI) -> None:
    def ask(seed: int) -> str | None:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Invent a name for a cat."}],
            max_tokens=12,
            temperature=1.5,
            seed=seed,
        )
        return answer.choices[0].message.content

    assert ask(7) == ask(7)
    assert len({ask(seed) for seed in range(4)}) > 1


def test_ask_for_several_choices(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        n=3,
        max_tokens=8,
        temperature=1.5,
        seed=1,
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 24


def test_stop_at_a_string_which_is_not_shown(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="1, 2, 3, 4,", max_tokens=40, temperature=0, stop=" 7")
    assert answer.choices[0].text == " 5, 6,"
    assert answer.choices[0].finish_reason == "stop"


def test_usage_counts_what_came_from_the_prefix_cache(client: openai.OpenAI) -> None:
    prompt = list(range(1000, 1100))
    usages = [
        client.completions.create(model=MODEL, prompt=prompt, max_tokens=2, extra_body={"ignore_eos": True}).usage
        for _ in range(2)
    ]
    cached = [u.prompt_tokens_details.cached_tokens for u in usages if u and u.prompt_tokens_details]
    assert cached == [0, 99]  # all but the last, whose logits are needed
    assert all(u and (u.prompt_tokens, u.completion_tokens) == (100, 2) for u in usages)


def test_words_can_be_forbidden_and_tokens_demanded(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 12}
    without = client.chat.completions.create(**ask, extra_body={"bad_words": ["Paris"]})
    assert "Paris" not in (without.choices[0].message.content or "")
    only = client.chat.completions.create(**ask, extra_body={"allowed_token_ids": [33], "ignore_eos": True})
    assert len(set(only.choices[0].message.content or "")) == 1


def test_a_mistake_is_answered_with_the_field_and_the_remedy(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=-1)
    assert caught.value.param == "temperature"


def test_what_is_not_supported_is_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="web_search_options") as caught:
        client.chat.completions.create(model=MODEL, messages=QUESTION, web_search_options={})
    assert caught.value.code == "unsupported_parameter"


def test_a_prompt_that_is_too_long_is_refused_before_the_stream_starts(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=[5] * 9000, stream=True)
    assert caught.value.code == "context_length_exceeded"


def test_sixteen_at_once_get_what_each_would_get_alone(client: openai.OpenAI) -> None:
    def ask(number: int) -> str:
        prompt = f"The number {number} is"
        return client.completions.create(model=MODEL, prompt=prompt, max_tokens=16, temperature=0).choices[0].text

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, range(16)))
    assert together[::5] == [ask(number) for number in range(0, 16, 5)]


def abandon(service: RunningService, body: dict[str, object]) -> None:
    """Send a request and hang up: after the first line of a stream, or while waiting for the whole answer."""
    address = ("127.0.0.1", service.port)
    with socket.create_connection(address) as connection:
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}"
        connection.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + content)
        if body["stream"]:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        else:
            wait_until(lambda: service.metric("tokenrelay_num_requests_running") > 0, "the request runs")


@pytest.mark.parametrize("stream", [True, False])
def test_closing_the_connection_cancels_the_request(service: RunningService, stream: bool) -> None:
    body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 4000, "ignore_eos": True, "stream": stream}
    before = service.metric("tokenrelay_requests_total")
    abandon(service, body)
    wait_until(lambda: service.metric("tokenrelay_requests_total") == before + 1, "the outcome is counted")
    wait_until(lambda: service.metric("tokenrelay_kv_cache_usage_ratio") == 0, "the blocks are free again")
    cancelled = f'tokenrelay_requests_total{{model_name="{MODEL}",outcome="cancelled"}}'
    assert service.metrics()[cancelled] >= 1
