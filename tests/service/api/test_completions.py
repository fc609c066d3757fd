"""POST /v1/completions: prompts in four forms, choices numbered prompt by prompt."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.service.api.conftest import accepted
from tests.service.api.serving import PacedWorker, Server, serving, words
from tokenrelay.service.api.served_model import ServedModel
from tokenrelay.service.settings import Settings


async def test_a_completion_has_openais_shape(server: Server, client: AsyncOpenAI, worker: PacedWorker) -> None:
    answer = await client.completions.create(model=server.model, prompt="Once upon a time")
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    [choice] = answer.choices
    assert (choice.index, choice.text, choice.finish_reason) == (0, words(8), "stop")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 8)


async def test_sixteen_tokens_are_the_default(server: Server, client: AsyncOpenAI, worker: PacedWorker) -> None:
    worker.length = 100
    answer = await client.completions.create(model=server.model, prompt="Once")
    assert (answer.choices[0].finish_reason, answer.choices[0].text) == ("length", words(16))


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("Once upon", [[6403, 1980]]),
        (["Once upon", "Once"], [[6403, 1980], [6403]]),
        ([6403, 1980], [[6403, 1980]]),
        ([[6403, 1980], [1]], [[6403, 1980], [1]]),
    ],
)
async def test_prompts_are_text_or_token_ids_or_lists_of_either(
    server: Server, client: AsyncOpenAI, worker: PacedWorker, prompt: Any, prompts: list[list[int]]
) -> None:
    answer = await client.completions.create(model=server.model, prompt=prompt)
    claimed = sorted(claim.submission.prompt_token_ids for claim in worker.claims)
    assert claimed == sorted(prompts)
    assert len(answer.choices) == len(prompts)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(map(len, prompts))
    assert answer.usage.completion_tokens == 8 * len(prompts)


@pytest.mark.parametrize("stream", [False, True])
async def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(
    server: Server, client: AsyncOpenAI, worker: PacedWorker, stream: bool
) -> None:
    create: Any = client.completions.create
    options = {"stream_options": {"include_usage": True}} if stream else {}
    answer = await create(model=server.model, prompt=["a", "b", "c"], n=2, stream=stream, **options)
    chunks = [chunk async for chunk in answer] if stream else [answer]
    texts = [""] * 6
    reasons: list[list[str]] = [[] for _ in texts]
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += choice.text
        reasons[choice.index] += [choice.finish_reason] if choice.finish_reason else []
    assert texts == [words(8)] * 6
    assert reasons == [["stop"]] * 6
    [usage] = [chunk.usage for chunk in chunks if chunk.usage]
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 48)


async def test_a_stream_has_one_finish_reason_and_no_role(
    server: Server, client: AsyncOpenAI, worker: PacedWorker
) -> None:
    stream = await client.completions.create(model=server.model, prompt="Once", stream=True, max_tokens=5)
    chunks = [chunk async for chunk in stream]
    assert [chunk.choices[0].text for chunk in chunks] == [" w0", " w1", " w2", " w3", " w4", ""]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 5 + ["length"]


@pytest.mark.parametrize("fields", [{}, {"logprobs": 1}])
async def test_best_of_keeps_the_likeliest_and_counts_all(
    server: Server, client: AsyncOpenAI, worker: PacedWorker, fields: dict[str, Any]
) -> None:
    worker.logprobs = (-3.0, -1.0, -2.0)
    create: Any = client.completions.create
    extra = {"return_token_ids": True}
    answer = await create(model=server.model, prompt=["a", "b"], n=2, best_of=3, extra_body=extra, **fields)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(choice.token_ids == list(range(8)) for choice in answer.choices)
    told = [choice.logprobs and choice.logprobs.token_logprobs[0] for choice in answer.choices]
    assert told == ([-1, -2, -1, -2] if fields else [None] * 4)
    assert answer.usage.completion_tokens == 2 * 3 * 8
    assert worker.claims[0].submission.params.n == 3


async def test_a_prompt_may_be_cut_to_its_end(server: Server, client: AsyncOpenAI, worker: PacedWorker) -> None:
    for num_kept, kept in ((1, [1980]), (2, [6403, 1980]), (9, [6403, 1980])):
        extra = {"truncate_prompt_tokens": num_kept, "echo": True}
        answer = await client.completions.create(model=server.model, prompt="Once upon", extra_body=extra)
        assert worker.claims[-1].submission.prompt_token_ids == kept
        assert answer.choices[0].text == server.process.model.tokenizer.decode(kept) + words(8)


async def test_a_prompt_cut_to_its_end_may_be_too_long_before(
    server: Server, client: AsyncOpenAI, worker: PacedWorker
) -> None:
    extra = {"truncate_prompt_tokens": 10}
    answer = await client.completions.create(model=server.model, prompt="word " * 3000, extra_body=extra)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 10


async def test_the_worker_gets_priority_salt_and_what_to_skip(
    server: Server, client: AsyncOpenAI, worker: PacedWorker
) -> None:
    extra: dict[str, Any] = {"priority": -100, "cache_salt": "mine", "skip_special_tokens": False}
    for fields, expected in ((extra, (-100, "mine", False)), (dict.fromkeys(extra), (0, "", True))):
        await client.completions.create(model=server.model, prompt="Once", extra_body=fields)
        submission = worker.claims[-1].submission
        assert (submission.priority, submission.cache_salt, submission.skip_special_tokens) == expected
        assert submission.tenant == "default"


async def test_special_tokens_are_added_unless_not_wanted(
    server: Server, client: AsyncOpenAI, worker: PacedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This model adds none: what matters is what its tokenizer is told."""
    told: list[dict[str, bool]] = []
    encode = server.process.model.tokenizer.encode

    def listening(text: str, **options: bool) -> list[int]:
        told.append(options)
        return encode(text, add_special_tokens=True)

    monkeypatch.setattr(server.process.model.tokenizer, "encode", listening)
    for fields in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}):
        await client.completions.create(model=server.model, prompt="Once", extra_body=fields)
    assert [options["add_special_tokens"] for options in told] == [True, True, False]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_control_token_that_a_prompt_spells_is_one(
    server: Server, client: AsyncOpenAI, worker: PacedWorker, stream: bool
) -> None:
    """A prompt is whole: who writes it writes the template's part, too, as in vLLM and llama.cpp."""
    create: Any = client.completions.create
    answer = await create(model=server.model, prompt="<|im_start|>Once<|im_end|>", stream=stream)
    if stream:
        assert [chunk async for chunk in answer]
    special = server.process.model.tokenizer.special_tokens
    assert worker.claims[-1].submission.prompt_token_ids == [special["<|im_start|>"], 6403, special["<|im_end|>"]]


async def test_too_many_prompts_are_refused(server: Server, client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="at most 16") as refused:
        await client.completions.create(model=server.model, prompt=["a"] * 17)
    assert refused.value.param == "prompt"


async def test_one_prompt_too_long_refuses_all(server: Server, client: AsyncOpenAI) -> None:
    before = accepted(server)
    with pytest.raises(openai.BadRequestError, match="2048"):
        await client.completions.create(model=server.model, prompt=["a", "word " * 3000])
    assert accepted(server) == before


async def test_a_full_queue_refuses_all_prompts_and_says_when_to_retry(
    api_settings: Settings, served_model: ServedModel
) -> None:
    settings = api_settings.model_copy(update={"max_waiting": 2})
    with serving(settings, served_model) as server:
        async with AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError) as refused:
                await client.completions.create(model=server.model, prompt=["a", "b", "c"])
        headers = refused.value.response.headers
        assert (refused.value.status_code, refused.value.code) == (503, "server_is_overloaded")
        assert (headers["x-should-retry"], int(headers["retry-after"]) >= 1) == ("true", True)
        assert int(headers["retry-after-ms"]) >= 1
    # the two that were queued are cancelled in the background, before the process ends
    assert server.metrics.get_sample_value("tokenrelay_requests_in_flight", {"model_name": server.model}) == 0
