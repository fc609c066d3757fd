"""The further parameters of a chat: each does what it says, or is refused by name."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from tests.service.api.serving import PacedWorker, Server, refused, serving, working
from tokenrelay.service.api.assistant.dialect import Dialect
from tokenrelay.service.api.lifecycle.choices import total_usage
from tokenrelay.service.api.lifecycle.timings import timings_of
from tokenrelay.service.api.served_model import ServedModel, load_served_model
from tokenrelay.service.messages import Submission, Usage
from tokenrelay.service.request_records import Moment
from tokenrelay.service.settings import Settings

QUESTION: Any = [{"role": "user", "content": "Hi"}]


async def answered(http: httpx.AsyncClient, server: Server, **fields: Any) -> dict[str, Any]:
    response = await http.post("/v1/chat/completions", json={"model": server.model, "messages": QUESTION, **fields})
    assert response.status_code == 200, response.text
    return dict(response.json())


async def chunks(client: AsyncOpenAI, server: Server, **fields: Any) -> list[Any]:
    stream: Any = await client.chat.completions.create(
        model=server.model, messages=QUESTION, stream=True, extra_body=fields
    )
    return [chunk async for chunk in stream]


async def submitted(http: httpx.AsyncClient, server: Server, worker: PacedWorker, **fields: Any) -> Submission:
    await answered(http, server, **fields)
    return worker.claims[-1].submission


async def test_limits_under_llama_cpp_s_name(server: Server, http: httpx.AsyncClient, worker: PacedWorker) -> None:
    assert (await submitted(http, server, worker, n_predict=3)).params.max_tokens == 3
    assert (await submitted(http, server, worker, n_predict=-1)).params.max_tokens > 1000
    assert (await submitted(http, server, worker, n_predict=3, max_tokens=3)).params.max_tokens == 3


async def test_without_the_cache_a_prompt_meets_no_other(
    server: Server, http: httpx.AsyncClient, worker: PacedWorker
) -> None:
    assert (await submitted(http, server, worker, cache_prompt=True)).cache_salt == ""
    salts = [(await submitted(http, server, worker, cache_prompt=False, cache_salt="s")).cache_salt for _ in range(2)]
    assert len({*salts, "s", ""}) == 4


async def test_tiers_are_priorities_and_are_echoed(
    server: Server, http: httpx.AsyncClient, worker: PacedWorker
) -> None:
    ranks = {}
    for tier, granted in (("auto", "default"), ("default", "default"), ("flex", "flex"), ("priority", "priority")):
        assert (await answered(http, server, service_tier=tier))["service_tier"] == granted
        ranks[tier] = worker.claims[-1].submission.priority
    assert ranks["priority"] < ranks["auto"] == ranks["default"] == 0 < ranks["flex"]
    assert "service_tier" not in await answered(http, server)


async def test_the_fingerprint_is_that_of_what_decides_the_text(
    server: Server, http: httpx.AsyncClient, client: AsyncOpenAI, worker: PacedWorker, smollm2_path: Any
) -> None:
    told = (await answered(http, server))["system_fingerprint"]
    assert {chunk.system_fingerprint for chunk in await chunks(client, server)} == {told}
    same, other = (
        load_served_model(Settings(model=str(smollm2_path), max_model_len=2048, dtype=dtype))
        for dtype in ("auto", "float32")
    )
    assert same.fingerprint == told != other.fingerprint


async def test_what_has_no_effect_is_taken(server: Server, http: httpx.AsyncClient, worker: PacedWorker) -> None:
    await answered(http, server, prompt_cache_key="k", safety_identifier="s", store=False, prompt_cache_retention=None)


async def test_usage_grows_with_every_chunk(server: Server, client: AsyncOpenAI, worker: PacedWorker) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    told = [chunk.usage for chunk in await chunks(client, server, stream_options=options)]
    assert [usage.completion_tokens for usage in told] == [0, *range(1, 9), 8, 8]
    assert {usage.prompt_tokens for usage in told} == {told[-1].prompt_tokens}
    assert all(usage.total_tokens == usage.prompt_tokens + usage.completion_tokens for usage in told)


@pytest.mark.parametrize("include_usage", [False, True])
async def test_timings_come_at_the_end(
    server: Server, http: httpx.AsyncClient, client: AsyncOpenAI, worker: PacedWorker, include_usage: bool
) -> None:
    whole = await answered(http, server, timings_per_token=True)
    assert (whole["timings"]["predicted_n"], whole["timings"]["prompt_n"]) == (8, whole["usage"]["prompt_tokens"])
    assert all(value >= 0 for value in whole["timings"].values())
    fields = {"timings_per_token": True, "stream_options": {"include_usage": include_usage}}
    *before, last = await chunks(client, server, **fields)
    assert last.timings.keys() == whole["timings"].keys()
    assert not any("timings" in chunk.model_extra for chunk in before)
    assert "timings" not in await answered(http, server)


def test_timings_are_those_of_the_timeline() -> None:
    """A second worker went on with it: that is a longer answer, and no second queue."""
    timeline = [
        Moment(10.0, "queued"),
        Moment(10.5, "claimed", "w1", 1),
        Moment(11.5, "first_token"),
        Moment(12.0, "requeued"),
        Moment(12.1, "claimed", "w2", 2),
        Moment(13.5, "finished"),
    ]
    timings = timings_of([timeline], total_usage([Usage(prompt_tokens=100, completion_tokens=20)]))
    assert (timings.queue_ms, timings.prompt_ms, timings.predicted_ms) == (500, 1000, 2000)
    assert (timings.prompt_per_second, timings.predicted_per_second) == (100, 10)
    assert timings_of([], total_usage([])).predicted_per_second == 0


async def test_a_turn_may_be_left_unbegun_or_be_gone_on_with(
    server: Server, http: httpx.AsyncClient, worker: PacedWorker
) -> None:
    tokenizer = server.process.model.tokenizer
    prompt = (await submitted(http, server, worker, add_generation_prompt=False)).prompt_token_ids
    assert prompt == tokenizer.encode_chat(QUESTION, add_generation_prompt=False)
    begun = [*QUESTION, {"role": "assistant", "content": "The answer is "}]
    prompt = (await submitted(http, server, worker, messages=begun, continue_final_message=True)).prompt_token_ids
    assert tokenizer.decode(prompt, skip_special_tokens=False).endswith("<|im_start|>assistant\nThe answer is ")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "n_predict 0": ({"n_predict": 0}, "n_predict"),
    "two limits": ({"n_predict": 3, "max_tokens": 4}, "n_predict"),
    "an unknown tier": ({"service_tier": "scale"}, "service_tier"),
    "tier and priority": ({"service_tier": "flex", "priority": 1}, "service_tier"),
    "store": ({"store": True}, "store"),
    "cache for a day": ({"prompt_cache_retention": "24h"}, "prompt_cache_retention"),
    "growing usage of none": (
        {"stream": True, "stream_options": {"continuous_usage_stats": True}},
        "stream_options.continuous_usage_stats",
    ),
    "two beginnings": ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    "effort": ({"reasoning_effort": "high"}, "reasoning_effort"),
    "an unknown effort": ({"reasoning_effort": "extreme"}, "reasoning_effort"),
    "an unknown argument": ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
    "thinking": ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs.enable_thinking"),
    "a nested argument": ({"chat_template_kwargs": {"documents": [{}]}}, "chat_template_kwargs.documents"),
    "a long argument": ({"chat_template_kwargs": {"a": "x" * 2000}}, "chat_template_kwargs.a"),
    "many arguments": ({"chat_template_kwargs": dict.fromkeys(map(str, range(100)), 1)}, "chat_template_kwargs"),
    "verbosity": ({"verbosity": "high"}, "verbosity"),
    "a template": ({"chat_template": "{{ messages }}"}, "chat_template"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_refused_by_name(server: Server, post: httpx.Client, name: str) -> None:
    fields, param = BAD[name]
    error = refused(post.post("/v1/chat/completions", json={"model": server.model, "messages": QUESTION, **fields}))
    assert error["param"].startswith(param)
    assert error["param"] in error["message"]


@pytest.fixture(scope="module")
def thinking(api_settings: Settings, loaded_model: ServedModel) -> Iterator[Server]:
    """A server whose model's template speaks of reasoning."""
    dialect = dataclasses.replace(Dialect.of(loaded_model.tokenizer), reasoning_format="think")
    name = f"thinking-{uuid.uuid4().hex[:8]}"
    with serving(api_settings, dataclasses.replace(loaded_model, name=name, dialect=dialect)) as server:
        yield server


class TestReasoning:
    """The model writes some."""

    PIECES = ("<think>", "\nTwo", " and two.", "\n</think>\n\n", "Four", ".")

    async def said(self, thinking: Server, **fields: Any) -> dict[str, Any]:
        async with (
            working(thinking, length=len(self.PIECES)),
            httpx.AsyncClient(base_url=thinking.base_url, timeout=60) as http,
        ):
            return dict((await answered(http, thinking, **fields))["choices"][0]["message"])

    @pytest.fixture(autouse=True)
    def _writes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tests.service.api.serving.word", lambda i: self.PIECES[i])

    async def test_it_is_split_off(self, thinking: Server) -> None:
        message = await self.said(thinking)
        assert (message["reasoning_content"], message["content"]) == ("Two and two.", "Four.")

    async def test_it_need_not_be_told_or_split(self, thinking: Server) -> None:
        without = await self.said(thinking, include_reasoning=False)
        assert without == {"role": "assistant", "content": "Four.", "refusal": None}
        assert (await self.said(thinking, separate_reasoning=False))["content"] == "".join(self.PIECES)

    async def test_a_shaped_text_has_none(self, thinking: Server) -> None:
        message = await self.said(thinking, response_format={"type": "json_object"})
        assert message["content"] == "".join(self.PIECES)

    async def test_streamed(self, thinking: Server) -> None:
        async with (
            working(thinking, length=len(self.PIECES)),
            AsyncOpenAI(base_url=f"{thinking.base_url}/v1", api_key="none", max_retries=0) as client,
        ):
            deltas = [chunk.choices[0].delta for chunk in await chunks(client, thinking)]
        assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Two and two."
        assert "".join(delta.content or "" for delta in deltas) == "Four."


def test_earlier_reasoning_reaches_the_template(server: Server, post: httpx.Client) -> None:
    """Under either name; a template that does not know it leaves it out."""
    for name in ("reasoning", "reasoning_content"):
        history = [*QUESTION, {"role": "assistant", "content": "Hi.", name: "Be kind."}, *QUESTION]
        sent = {"model": server.model, "messages": history, "max_tokens": 10**6}
        assert refused(post.post("/v1/chat/completions", json=sent))["code"] == "context_length_exceeded"
