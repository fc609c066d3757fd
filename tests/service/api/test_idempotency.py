"""A repeated request with the same Idempotency-Key is the first one again: nothing is generated twice."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.service.api.conftest import accepted, ended
from tests.service.api.serving import Server, refused, wait_for, words, working
from tests.service.api.test_disconnect import connection, until

BODY: dict[str, Any] = {"prompt": "Once", "n": 2}


async def ask(http: httpx.AsyncClient, server: Server, key: str, **fields: Any) -> httpx.Response:
    body = {"model": server.model, **BODY, **fields}
    return await http.post("/v1/completions", json=body, headers={"Idempotency-Key": key})


@pytest.mark.parametrize("stream", [False, True])
async def test_the_answer_is_the_first_ones(server: Server, http: httpx.AsyncClient, stream: bool) -> None:
    async with working(server) as worker:
        first, again = [await ask(http, server, f"same {stream}".replace(" ", "-"), stream=stream) for _ in range(2)]
    assert len(worker.claims) == 1
    assert first.text == again.text
    assert ("idempotent-replayed" in first.headers, again.headers["idempotent-replayed"]) == (False, "true")
    assert words(8) in first.text or stream


async def test_duplicates_at_the_same_time_share_one_generation(server: Server, http: httpx.AsyncClient) -> None:
    before = accepted(server)
    async with working(server, held_back=True) as worker:
        asking = [asyncio.create_task(ask(http, server, "together")) for _ in range(8)]
        await asyncio.to_thread(wait_for, lambda: sum(server.process.generations._num_readers.values()) == 8)
        worker.gate.set()
        answers = await asyncio.gather(*asking)
    assert accepted(server) == before + 1
    assert len({answer.text for answer in answers}) == 1


async def test_duplicates_of_several_prompts_too(server: Server, http: httpx.AsyncClient) -> None:
    async with working(server) as worker:
        answers = await asyncio.gather(*(ask(http, server, "several", prompt=["a", "b", "c"]) for _ in range(5)))
    assert len(worker.claims) == 3
    assert len({answer.text for answer in answers}) == 1
    assert [choice["index"] for choice in answers[0].json()["choices"]] == list(range(6))


@pytest.mark.parametrize("on_disconnect", ["continue", "cancel"])
async def test_after_a_lost_reply_the_answer_is_there(
    server: Server, http: httpx.AsyncClient, on_disconnect: str
) -> None:
    """The client's first connection broke. If that cancelled the request, it begins anew: a key stands for a result."""
    before = ended(server)
    key, fields = f"lost-{on_disconnect}", {"on_disconnect": on_disconnect, "stream": True, "max_tokens": 1000}
    async with working(server, length=30, pace=0.1) as worker:  # slow enough to be cancelled before it is done
        async with connection(server, {"Idempotency-Key": key}, **BODY, **fields) as reader:
            await reader.readuntil(b'w3"')
        if on_disconnect == "cancel":
            await until(lambda: worker.cancelled)
        worker.pace = 0.001
        answer = await ask(http, server, key, **fields)
        await until(lambda: ended(server) == before + len(worker.claims))
    assert len(worker.claims) == (1 if on_disconnect == "continue" else 2)
    assert answer.text.count(" w29") == 2


async def test_what_means_the_same_is_the_same(server: Server, http: httpx.AsyncClient) -> None:
    """Order, white space and nulls do not matter."""
    contents = ('{"model": "%s", "prompt": "a", "n": null}', '{"prompt":"a","model":"%s"}')
    headers = {"Idempotency-Key": "means", "content-type": "application/json"}
    async with working(server) as worker:
        answers = [
            await http.post("/v1/completions", content=content % server.model, headers=headers) for content in contents
        ]
    assert len(worker.claims) == 1
    assert answers[0].text == answers[1].text


@pytest.mark.parametrize("fields", [{"prompt": "Twice"}, {"seed": 1}, {"stream": True}, {"prompt": ["Once", "Once"]}])
async def test_the_key_of_another_body_is_refused(
    server: Server, http: httpx.AsyncClient, fields: dict[str, Any]
) -> None:
    async with working(server):
        await ask(http, server, "taken")
        error = refused(await ask(http, server, "taken", **fields), 422)
    assert error["code"] == "idempotency_key_reused"


async def test_each_route_is_another_request(server: Server, http: httpx.AsyncClient) -> None:
    async with working(server):
        await ask(http, server, "route")
        chat = {"model": server.model, "messages": [{"role": "user", "content": "Once"}]}
        refused(await http.post("/v1/chat/completions", json=chat, headers={"Idempotency-Key": "route"}), 422)


async def test_an_explicit_cancellation_frees_the_key(server: Server, http: httpx.AsyncClient) -> None:
    async with working(server, held_back=True) as worker:
        first = asyncio.create_task(ask(http, server, "freed"))
        await asyncio.to_thread(wait_for, lambda: worker.claims)
        await http.delete(f"/v1/requests/{worker.claims[0].submission.request_id}")
        await asyncio.to_thread(wait_for, lambda: worker.cancelled)
        second = asyncio.create_task(ask(http, server, "freed"))  # though the first has not ended yet
        await asyncio.to_thread(wait_for, lambda: len(worker.claims) == 2)
        worker.gate.set()
        assert (await first).status_code == 499
        assert (await second).status_code == 200
        assert (await ask(http, server, "freed")).text == (await second).text


@pytest.mark.parametrize("key", ["", "two words", "ü", "x" * 256])
async def test_a_key_is_up_to_255_visible_characters(server: Server, http: httpx.AsyncClient, key: str) -> None:
    headers = [(b"idempotency-key", key.encode())]
    response = await http.post("/v1/completions", json={"model": server.model, **BODY}, headers=headers)
    assert refused(response)["param"] == "Idempotency-Key"
