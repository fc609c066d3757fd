"""POST /v1/chat/completions, as the openai client meets it."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.service.api.serving import PacedWorker, Server, words

QUESTION: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the capital of France?"},
]


async def test_an_answer_has_openais_shape(server: Server, client: AsyncOpenAI, worker: PacedWorker) -> None:
    worker.cached_tokens = 16
    answer = await client.chat.completions.create(model=server.model, messages=QUESTION)
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", server.model)
    [choice] = answer.choices
    assert (choice.index, choice.finish_reason) == (0, "stop")
    assert (choice.message.role, choice.message.content) == ("assistant", words(8))
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens == len(server.process.model.tokenizer.encode_chat(QUESTION))
    assert usage.completion_tokens == 8
    assert usage.total_tokens == usage.prompt_tokens + 8
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 16


async def test_max_tokens_ends_with_length_under_either_name(
    server: Server, client: AsyncOpenAI, worker: PacedWorker
) -> None:
    create: Any = client.chat.completions.create
    for limit in ({"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 3, "max_completion_tokens": 3}):
        answer = await create(model=server.model, messages=QUESTION, **limit)
        assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("length", words(3))


async def test_a_stream_opens_with_the_role_and_ends_with_one_finish_reason(
    server: Server, client: AsyncOpenAI, worker: PacedWorker
) -> None:
    stream = await client.chat.completions.create(model=server.model, messages=QUESTION, stream=True)
    chunks = [chunk async for chunk in stream]
    assert len({chunk.id for chunk in chunks}) == 1
    first, *middle, last = [chunk.choices[0] for chunk in chunks]
    assert (first.delta.role, first.delta.content) == ("assistant", "")
    assert "".join(choice.delta.content or "" for choice in middle) == words(8)
    assert [choice.finish_reason for choice in (first, *middle)] == [None] * 9
    assert (last.finish_reason, last.delta.content) == ("stop", None)
    assert all(chunk.usage is None for chunk in chunks)


async def test_include_usage_adds_one_chunk_without_choices(
    server: Server, client: AsyncOpenAI, worker: PacedWorker
) -> None:
    stream = await client.chat.completions.create(
        model=server.model, messages=QUESTION, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = [chunk async for chunk in stream]
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 8


@pytest.mark.parametrize("stream", [False, True])
async def test_n_choices_are_told_apart_by_their_index(
    server: Server, client: AsyncOpenAI, worker: PacedWorker, stream: bool
) -> None:
    texts = ["", "", ""]
    reasons: list[list[str]] = [[], [], []]
    create: Any = client.chat.completions.create
    answer = await create(model=server.model, messages=QUESTION, n=3, stream=stream)
    chunks = [chunk async for chunk in answer] if stream else [answer]
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += (choice.delta if stream else choice.message).content or ""
        reasons[choice.index] += [choice.finish_reason] if choice.finish_reason else []
    assert texts == [words(8)] * 3
    assert reasons == [["stop"]] * 3


async def test_the_worker_gets_what_the_client_asked_for(
    server: Server, client: AsyncOpenAI, worker: PacedWorker
) -> None:
    await client.chat.completions.create(
        model=server.model,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        ],
        temperature=0.5,
        top_p=0.9,
        seed=7,
        stop=["\n", "END"],
        max_tokens=20,
        user="u-1",
        metadata={"trace": "t-1"},
        extra_body={"top_k": 40, "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [2, 3]},
    )
    [claim] = worker.claims
    params = claim.submission.params
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.5, 0.9, 40, 7)
    assert (params.max_tokens, params.min_tokens, params.ignore_eos, params.n) == (20, 2, True, 1)
    assert (params.stop, params.stop_token_ids) == (("\n", "END"), (2, 3))
    seen = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one\ntwo"}]
    assert claim.submission.prompt_token_ids == server.process.model.tokenizer.encode_chat(seen)


async def test_defaults_fill_the_context_and_draw_a_seed(
    server: Server, client: AsyncOpenAI, worker: PacedWorker
) -> None:
    for _ in range(2):
        await client.chat.completions.create(model=server.model, messages=QUESTION)
    one, two = (claim.submission for claim in worker.claims)
    assert (one.params.temperature, one.params.top_p, one.params.top_k) == (1.0, 1.0, 0)
    assert one.params.max_tokens == server.process.model.max_model_len - len(one.prompt_token_ids)
    assert one.params.seed != two.params.seed


async def test_neutral_values_of_what_is_not_built_are_accepted(
    server: Server, client: AsyncOpenAI, worker: PacedWorker
) -> None:
    neutral: Any = {
        **{"presence_penalty": 0, "frequency_penalty": 0.0, "logprobs": False, "top_logprobs": None, "logit_bias": {}},
        **{"response_format": {"type": "text"}, "tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        **{"store": False, "service_tier": "auto", "repetition_penalty": 1.0, "min_p": 0, "mirostat": 0},
    }
    history: Any = {"role": "assistant", "content": "Hi", "tool_calls": None, "refusal": None, "annotations": []}
    answer = await client.chat.completions.create(
        model=server.model, messages=[QUESTION[1], history, QUESTION[1]], extra_body=neutral
    )
    assert answer.choices[0].finish_reason == "stop"


async def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(
    server: Server, client: AsyncOpenAI
) -> None:
    with pytest.raises(openai.BadRequestError, match="context holds 2048") as refused:
        await client.chat.completions.create(
            model=server.model, messages=[{"role": "user", "content": "word " * 4000}], stream=True
        )
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")


async def test_max_tokens_beyond_the_context_is_refused_with_the_remedy(server: Server, client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"ask for at most \d+") as refused:
        await client.chat.completions.create(model=server.model, messages=QUESTION, max_tokens=2048)
    assert refused.value.code == "context_length_exceeded"


async def test_another_model_is_not_found(server: Server, client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        await client.chat.completions.create(model="gpt-4o", messages=QUESTION)
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


async def test_models_are_listed_and_described(server: Server, client: AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [server.model]
    assert (await client.models.retrieve(server.model)).owned_by == "tokenrelay"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("org/other")
