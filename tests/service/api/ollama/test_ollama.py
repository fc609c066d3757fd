"""Ollama's routes: what stands on the wire, and what ollama's client makes of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import ollama
import pytest
from ollama import AsyncClient

from tests.service.api.conftest import ended
from tests.service.api.serving import PacedWorker, Server, wait_for, word, words, working
from tokenrelay.service.messages import Error

USER = {"role": "user", "content": "What is the capital of France?"}
DURATIONS = ("load_duration", "prompt_eval_duration", "eval_duration")


@pytest.fixture
async def llama(server: Server) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(host=server.base_url, timeout=60) as client:
        yield client


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in response.text.split("\n")[:-1]]


async def test_a_chat_comes_in_lines_and_the_last_one_tells_what_it_took(
    server: Server, http: httpx.AsyncClient
) -> None:
    async with working(server, length=2):
        response = await http.post("/api/chat", json={"model": server.model, "messages": [USER]})
    *told, end = lines(response)
    assert [line["message"] for line in told] == [{"role": "assistant", "content": word(i)} for i in range(2)]
    assert not any(line["done"] for line in told)
    assert {line["model"] for line in (*told, end)} == {server.model}
    assert (end["message"]["content"], end["done"], end["done_reason"]) == ("", True, "stop")
    assert (end["prompt_eval_count"] > 0, end["eval_count"]) == (True, 2)
    assert end["total_duration"] == sum(end[name] for name in DURATIONS) > 0


async def test_a_whole_answer_is_the_lines_in_one(server: Server, llama: AsyncClient, worker: PacedWorker) -> None:
    answer = await llama.chat(server.model, [USER], options={"num_predict": 3})
    assert (answer.message.role, answer.message.content) == ("assistant", words(3))
    assert (answer.done, answer.done_reason, answer.eval_count) == (True, "length", 3)
    streamed = [part async for part in await llama.chat(server.model, [USER], stream=True)]
    assert "".join(part.message.content or "" for part in streamed) == words(8)
    assert [part.done for part in streamed] == [False] * (len(streamed) - 1) + [True]


async def test_generate_answers_a_prompt(server: Server, llama: AsyncClient, worker: PacedWorker) -> None:
    answer = await llama.generate(server.model, "Hi", system="Be brief.")
    assert (answer.response, answer.done_reason) == (words(8), "stop")
    tokenizer = server.process.model.tokenizer
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert worker.claims[-1].submission.prompt_token_ids == tokenizer.encode_chat(asked)


async def test_a_raw_prompt_has_no_template(server: Server, llama: AsyncClient, worker: PacedWorker) -> None:
    parts = [part async for part in await llama.generate(server.model, "Once upon", raw=True, stream=True)]
    assert "".join(part.response or "" for part in parts) == words(8)
    submission = worker.claims[-1].submission
    assert submission.prompt_token_ids == server.process.model.tokenizer.encode("Once upon", add_special_tokens=True)
    context = server.process.model.context
    assert submission.params.max_tokens == context - len(submission.prompt_token_ids)


async def test_logprobs_on_request(server: Server, http: httpx.AsyncClient) -> None:
    fields = {"model": server.model, "messages": [USER], "logprobs": True, "top_logprobs": 2}
    async with working(server, length=1):
        first, _ = lines(await http.post("/api/chat", json=fields))
    [token] = first["logprobs"]
    assert (token["logprob"], len(token["top_logprobs"])) == (-0.5, 2)


@pytest.mark.parametrize(("path", "field"), [("/api/chat", "message"), ("/api/generate", "response")])
async def test_who_asks_for_nothing_learns_that_the_model_is_loaded(
    server: Server, http: httpx.AsyncClient, path: str, field: str
) -> None:
    told = (await http.post(path, json={"model": f"{server.model}:latest"})).json()
    assert (told["done"], told["done_reason"]) == (True, "load")
    assert field in told


async def test_a_failure_is_the_last_line(server: Server, http: httpx.AsyncClient, llama: AsyncClient) -> None:
    async with working(server, error=Error(message="Lost.", code="worker_lost")):
        told = lines(await http.post("/api/chat", json={"model": server.model, "messages": [USER]}))
        with pytest.raises(ollama.ResponseError, match=r"Lost\."):
            await llama.chat(server.model, [USER])
        with pytest.raises(ollama.ResponseError, match=r"Lost\."):
            [part async for part in await llama.chat(server.model, [USER], stream=True)]
    assert told[-1] == {"error": "Lost."}
    assert not any(line["done"] for line in told[:-1])


@pytest.mark.parametrize(
    ("fields", "status", "named"),
    [
        ({"model": "nobody"}, 404, "nobody"),
        ({"options": {"num_ctx": 10**6}}, 400, "options.num_ctx"),
        ({"options": {"num_gpu": 1}}, 400, "options.num_gpu"),
        ({"think": True}, 400, "think"),
    ],
)
async def test_a_refusal_is_one_sentence(
    server: Server, http: httpx.AsyncClient, fields: dict[str, Any], status: int, named: str
) -> None:
    response = await http.post("/api/chat", json={"model": server.model, "messages": [USER]} | fields)
    assert response.status_code == status
    assert response.json().keys() == {"error"}
    assert f"'{named}'" in response.json()["error"]


async def test_a_client_that_leaves_cancels(server: Server, llama: AsyncClient) -> None:
    before = ended(server, "cancelled")
    async with working(server, length=10**6, pace=0.01):
        parts = await llama.chat(server.model, [USER], stream=True)
        await anext(parts)
        await parts.aclose()  # type: ignore[attr-defined]
        await asyncio.to_thread(wait_for, lambda: ended(server, "cancelled") == before + 1)


async def test_a_silent_stream_says_nothing_that_is_no_line(server: Server, http: httpx.AsyncClient) -> None:
    """Clients parse every line. The time of a keep-alive passes before the first token."""
    async with working(server, held_back=True, length=1) as worker:
        reading = asyncio.create_task(http.post("/api/chat", json={"model": server.model, "messages": [USER]}))
        await asyncio.to_thread(wait_for, lambda: worker.claims)
        waited = worker.steps
        await asyncio.to_thread(wait_for, lambda: worker.steps > waited + 100)
        worker.gate.set()
        assert [line["done"] for line in lines(await reading)] == [False, True]


async def test_a_stream_is_read_again_by_its_id(server: Server, http: httpx.AsyncClient) -> None:
    async with working(server, length=3):
        whole = await http.post("/api/chat", json={"model": server.model, "messages": [USER]})
        url = f"/v1/requests/{whole.headers['x-response-id']}/stream"
        again = await http.get(url)
        rest = await http.get(url, params={"starting_after": "2"})
    assert lines(again) == lines(whole)
    assert lines(rest) == lines(whole)[2:]


async def test_the_one_model_is_listed_shown_and_running(server: Server, llama: AsyncClient) -> None:
    [listed] = (await llama.list()).models
    assert listed.model == f"{server.model}:latest"
    assert listed.details is not None
    assert (listed.details.format, listed.details.family, listed.details.parameter_size) == ("gguf", "llama", "134.5M")
    assert listed.details.quantization_level == "Q4_1"
    assert listed.size is not None
    assert listed.size > 90_000_000
    shown = await llama.show(listed.model)
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.context_length"] == server.process.model.context
    assert {"completion", "tools"} <= set(shown.capabilities or ())
    assert "<|im_start|>" in (shown.template or "")
    [running] = (await llama.ps()).models
    assert (running.model, running.digest) == (listed.model, listed.digest)
    with pytest.raises(ollama.ResponseError, match="nobody"):
        await llama.show("nobody")


async def test_the_version_is_one_that_front_ends_accept(server: Server, http: httpx.AsyncClient) -> None:
    told = (await http.get("/api/version")).json()["version"]
    assert [int(part) for part in told.split(".")] >= [0, 6, 4]
