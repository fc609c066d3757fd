"""POST /v1/embeddings: inputs in four forms, answers in two, and what is wrong told by its place."""

from __future__ import annotations

import base64
import math
import struct
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from tests.service.api.conftest import accepted, ended
from tests.service.api.serving import (
    EMBEDDING_SIZE,
    PacedWorker,
    Server,
    embedding_of,
    refused,
    serving,
    sse_events,
    wait_for,
)
from tokenrelay.service.api.served_model import ServedModel
from tokenrelay.service.settings import Settings

ONCE, UPON = 6403, 1980


def numbers(embedding: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(embedding) // 4}f", embedding))


async def test_an_embedding_has_openais_shape(server: Server, http: httpx.AsyncClient, worker: PacedWorker) -> None:
    response = await http.post("/v1/embeddings", json={"model": server.model, "input": "Once upon"})
    assert response.json() == {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": numbers(embedding_of([ONCE, UPON]))}],
        "model": server.model,
        "usage": {"prompt_tokens": 2, "total_tokens": 2},
    }
    assert response.headers["x-response-id"].startswith("embd-")


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("Once upon", [[ONCE, UPON]]),
        (["Once upon", "Once"], [[ONCE, UPON], [ONCE]]),
        ([ONCE, UPON], [[ONCE, UPON]]),
        ([[ONCE, UPON], [1]], [[ONCE, UPON], [1]]),
    ],
)
async def test_inputs_are_text_or_token_ids_or_lists_of_either(
    server: Server, client: AsyncOpenAI, worker: PacedWorker, given: Any, inputs: list[list[int]]
) -> None:
    answer = await client.embeddings.create(model=server.model, input=given)
    assert [one.index for one in answer.data] == list(range(len(inputs)))
    assert [one.embedding for one in answer.data] == [numbers(embedding_of(token_ids)) for token_ids in inputs]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, inputs))


async def test_both_formats_have_the_same_numbers(server: Server, client: AsyncOpenAI, worker: PacedWorker) -> None:
    asked: Any = {"model": server.model, "input": "Once"}
    by_default = await client.embeddings.create(**asked)  # openai's client asks for base64, and decodes it
    as_floats = await client.embeddings.create(**asked, encoding_format="float")
    in_base64 = await client.embeddings.create(**asked, encoding_format="base64")
    assert by_default.data[0].embedding == as_floats.data[0].embedding == numbers(embedding_of([ONCE]))
    encoded: Any = in_base64.data[0].embedding
    assert base64.b64decode(encoded) == embedding_of([ONCE])


async def test_fewer_dimensions_have_the_length_1_again(
    server: Server, client: AsyncOpenAI, worker: PacedWorker
) -> None:
    whole = numbers(embedding_of([ONCE]))
    for dimensions in (1, 3, EMBEDDING_SIZE):
        answer = await client.embeddings.create(model=server.model, input="Once", dimensions=dimensions)
        length = math.hypot(*whole[:dimensions])
        expected = [number / length for number in whole[:dimensions]]
        assert answer.data[0].embedding == pytest.approx(expected, rel=1e-6)
        assert math.hypot(*answer.data[0].embedding) == pytest.approx(1, abs=1e-6)


async def test_the_worker_gets_what_was_asked_for(server: Server, client: AsyncOpenAI, worker: PacedWorker) -> None:
    asked = {"pooling": "last", "priority": 3, "cache_salt": "mine", "truncate_prompt_tokens": 1}
    for fields, expected in ((asked, ("last", 3, "mine", [UPON])), ({}, ("mean", 0, "", [ONCE, UPON]))):
        await client.embeddings.create(model=server.model, input="Once upon", user="me", extra_body=fields)
        sent = worker.claims[-1].submission
        assert (sent.pooling, sent.priority, sent.cache_salt, sent.prompt_token_ids) == expected
        assert sent.cost == len(sent.prompt_token_ids)


async def test_a_setting_decides_how_to_pool(api_settings: Settings, served_model: ServedModel) -> None:
    settings = api_settings.model_copy(update={"pooling": "last", "max_waiting": 1})
    with serving(settings, served_model) as server:
        async with AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=0.3) as client:
            with pytest.raises(openai.APITimeoutError):  # no worker is there: what was sent is looked at in the broker
                await client.embeddings.create(model=server.model, input="Once")
            assert server.process.admission._settings.pooling == "last"
            with pytest.raises(openai.BadRequestError, match="at most 1 inputs"):
                await client.embeddings.create(model=server.model, input=["Once", "upon"])


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": ""}, "input", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": ["Once", ""]}, "input.1", "invalid_value"),
        ({"input": [[1], []]}, "input.1", "invalid_value"),
        ({"input": [[1], [2, 10**6]]}, "input.1", "invalid_value"),
        ({"input": [1, -1]}, "input", "invalid_value"),
        ({"input": ["Once", "word " * 3000]}, "input.1", "context_length_exceeded"),
        ({"input": "word " * 3000}, "input", "context_length_exceeded"),
        ({"input": ["a", 1]}, "input.1", "invalid_value"),
        ({"input": ["a"] * 2049}, "input", "invalid_value"),
        ({}, "input", "missing_required_parameter"),
        ({"input": "a", "dimensions": 0}, "dimensions", "invalid_value"),
        ({"input": "a", "dimensions": EMBEDDING_SIZE + 1}, "dimensions", "invalid_value"),
        ({"input": "a", "pooling": "max"}, "pooling", "invalid_value"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ({"input": "a", "normalize": False}, "normalize", "unsupported_parameter"),
        ({"input": "a", "stream": True}, "stream", "unknown_parameter"),
        ({"input": "a", "model": "other"}, "model", "model_not_found"),
    ],
)
def test_what_is_wrong_is_told_by_its_place(
    server: Server, post: httpx.Client, fields: dict[str, Any], param: str, code: str
) -> None:
    before = accepted(server)
    response = post.post("/v1/embeddings", json={"model": server.model} | fields)
    error = refused(response, 404 if code == "model_not_found" else 400)
    assert (error["param"], error["code"]) == (param, code)
    assert f"'{param}'" in error["message"] or param == "model"
    assert accepted(server) == before


async def test_an_input_may_fill_the_context(server: Server, client: AsyncOpenAI, worker: PacedWorker) -> None:
    limit = server.process.model.max_model_len
    answer = await client.embeddings.create(model=server.model, input=[[1] * limit])
    assert answer.usage.prompt_tokens == limit
    with pytest.raises(openai.BadRequestError, match=f"{limit + 1} tokens"):
        await client.embeddings.create(model=server.model, input=[[1] * (limit + 1)])


async def test_many_inputs_come_in_their_order(server: Server, client: AsyncOpenAI, worker: PacedWorker) -> None:
    answer = await client.embeddings.create(model=server.model, input=[[i] for i in range(1, 301)])
    assert [one.embedding[0] for one in answer.data] == [numbers(embedding_of([i]))[0] for i in range(1, 301)]


async def test_a_client_that_leaves_cancels(server: Server, client: AsyncOpenAI) -> None:
    before = ended(server, "cancelled")
    with pytest.raises(openai.APITimeoutError):
        await client.with_options(timeout=0.3).embeddings.create(model=server.model, input=["a", "b"])
    wait_for(lambda: ended(server, "cancelled") == before + 2)


async def test_a_deadline_holds(server: Server, client: AsyncOpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as late:
        await client.embeddings.create(model=server.model, input="a", extra_body={"timeout": 0.2})
    assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")


async def test_a_repetition_gets_the_first_answer(server: Server, client: AsyncOpenAI, worker: PacedWorker) -> None:
    key = {"Idempotency-Key": "embeddings-once"}
    answers = [
        await client.embeddings.with_raw_response.create(model=server.model, input=["a", "b"], extra_headers=key)
        for _ in range(2)
    ]
    assert answers[0].content == answers[1].content
    assert answers[1].headers["idempotent-replayed"] == "true"
    assert len(worker.claims) == 2


async def test_a_request_is_known_by_its_id(server: Server, http: httpx.AsyncClient, worker: PacedWorker) -> None:
    body = {"model": server.model, "input": ["Once", "upon"], "encoding_format": "base64", "dimensions": 2}
    answer = await http.post("/v1/embeddings", json=body)
    name = answer.headers["x-response-id"]
    status = (await http.get(f"/v1/requests/{name}")).json()
    assert (status["id"], status["state"], status["outcome"]) == (name, "finished", "stop")
    assert status["computed_prompt_tokens"] == status["prompt_tokens"] == 2
    *events, end = sse_events((await http.get(f"/v1/requests/{name}/stream")).text.partition("\n")[2])
    assert end["data"] == "[DONE]"
    told = [httpx.Response(200, text=event["data"]).json() for event in events]
    data = sorted((one for chunk in told for one in chunk["data"]), key=lambda one: one["index"])
    assert data == answer.json()["data"]
    assert told[-1]["usage"] == answer.json()["usage"]
