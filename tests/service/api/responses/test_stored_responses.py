"""Stored responses by their ids, at any process: read, followed, continued, cancelled, deleted, and never lost."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from tests.service.api.keyed import KeyFile, asking_as, keyed
from tests.service.api.responses.openai_events import require_whole
from tests.service.api.responses.test_responses import URL, events_in, streamed
from tests.service.api.serving import PacedWorker, Server, api_process, refused, serving, words, working
from tokenrelay.service.api.responses.store import ResponseStore
from tokenrelay.service.api.served_model import ServedModel
from tokenrelay.service.broker import connect
from tokenrelay.service.errors import NotFoundError
from tokenrelay.service.keys import Keys
from tokenrelay.service.settings import Settings

Fields = dict[str, Any]
PATHS = [("GET", ""), ("GET", "?stream=true"), ("POST", "/cancel"), ("DELETE", ""), ("GET", "/input_items")]


async def created(http: httpx.AsyncClient, server: Server, **fields: Any) -> Fields:
    response = await http.post(URL, json={"model": server.model, "input": "Hi", **fields})
    assert response.status_code == 200, response.text
    return dict(response.json())


async def retrieved(http: httpx.AsyncClient, id: str) -> Fields:
    response = await http.get(f"{URL}/{id}")
    assert response.status_code == 200, response.text
    return dict(response.json())


async def ended(http: httpx.AsyncClient, id: str) -> Fields:
    """As soon as it has."""
    async with asyncio.timeout(60):
        while (response := await retrieved(http, id))["status"] in ("queued", "in_progress"):
            pass
    return response


async def followed(http: httpx.AsyncClient, id: str, after: int | None = None) -> list[Fields]:
    params = {"stream": "true"} | ({} if after is None else {"starting_after": str(after)})
    return events_in(await http.get(f"{URL}/{id}", params=params))


async def forget_log(server: Server, id: str) -> None:
    """As it goes when its retention is over."""
    async with connect(server.settings.redis_url) as redis:
        relay_id = id.removeprefix("resp_")
        await redis.delete(server.keys.request(relay_id), server.keys.log(relay_id))


async def written_down(server: Server, id: str) -> None:
    """The process that made it has noticed its end."""
    async with connect(server.settings.redis_url) as redis, asyncio.timeout(60):
        while not await redis.hexists(server.keys.response(id.removeprefix("resp_")), "output"):
            pass


async def test_it_is_read_again_anywhere_also_when_its_log_is_gone(
    server: Server, http: httpx.AsyncClient, other: httpx.AsyncClient, worker: PacedWorker
) -> None:
    response = await created(http, server, metadata={"a": "b"})
    assert await retrieved(other, response["id"]) == response
    await written_down(server, response["id"])
    await forget_log(server, response["id"])
    assert await retrieved(other, response["id"]) == response
    error = refused(await other.get(f"{URL}/{response['id']}", params={"stream": "true"}), 404)
    assert error["param"] == "stream"


async def test_behind_any_event_the_stream_reads_on_as_it_was(
    server: Server, http: httpx.AsyncClient, other: httpx.AsyncClient, worker: PacedWorker
) -> None:
    whole = await streamed(http, server)
    id = whole[0]["response"]["id"]
    assert await followed(other, id) == whole
    for event in whole[:-1]:
        after = event["sequence_number"]
        assert await followed(other, id, after) == whole[after + 1 :]


async def test_in_the_background_it_goes_on_without_a_client(
    server: Server, http: httpx.AsyncClient, other: httpx.AsyncClient
) -> None:
    async with working(server, held_back=True) as worker:
        response = await created(http, server, background=True)
        assert (response["status"], response["output"]) == ("queued", [])
        assert (await retrieved(other, response["id"]))["status"] in ("queued", "in_progress")
        worker.gate.set()
        final = await ended(other, response["id"])
    assert final["status"] == "completed"
    assert final["output"][0]["content"][0]["text"] == words(8)
    events = await followed(other, response["id"])
    require_whole(events)
    assert events[-1]["response"] == final


async def test_a_background_stream_is_left_and_joined_elsewhere(
    server: Server, http: httpx.AsyncClient, other: httpx.AsyncClient
) -> None:
    body = {"model": server.model, "input": "Hi", "stream": True, "background": True}
    async with working(server, held_back=True) as worker:
        async with http.stream("POST", URL, json=body) as leaving:
            id = leaving.headers["x-response-id"]
        following = asyncio.create_task(followed(other, id, after=1))
        worker.gate.set()
        events = await following
    assert events[0]["sequence_number"] == 2
    assert events[-1]["type"] == "response.completed"
    assert worker.cancelled == {}


async def test_a_process_is_killed_and_another_completes_what_it_began(
    server: Server, http: httpx.AsyncClient, api_settings: Settings, served_model: ServedModel, smollm2_path: Any
) -> None:
    settings = api_settings.model_copy(
        update={"model": str(smollm2_path), "served_model_name": served_model.name, "max_model_len": 2048}
    )
    async with (
        working(server, length=300, pace=0.005),
        api_process(settings, served_model.name) as (process, endpoint),
        httpx.AsyncClient(base_url=endpoint.base_url, timeout=100) as doomed,
    ):
        response = await created(doomed, server, background=True)
        async with asyncio.timeout(60):
            while not (await retrieved(http, response["id"]))["output"]:
                pass
        process.kill()
        process.wait()
        final = await ended(http, response["id"])
    assert final["status"] == "completed"
    assert final["output"][0]["content"][0]["text"] == words(300)
    await forget_log(server, response["id"])  # it was written down by who was asked
    assert await retrieved(http, response["id"]) == final


async def test_a_log_is_kept_until_the_response_is_written_down(
    server: Server, http: httpx.AsyncClient, worker: PacedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.process.responses, "keep", lambda relay_id: None)  # as if it had died
    response = await created(http, server)
    async with connect(server.settings.redis_url) as redis:
        log = server.keys.log(response["id"].removeprefix("resp_"))
        assert await redis.ttl(log) > server.settings.retention_seconds
        await retrieved(http, response["id"])
        assert 0 < await redis.ttl(log) <= server.settings.retention_seconds


async def test_a_conversation_goes_on_behind_a_response(
    client: AsyncOpenAI, server: Server, worker: PacedWorker
) -> None:
    first = await client.responses.create(model=server.model, input="One?", instructions="Only now.")
    second = await client.responses.create(model=server.model, input="Two?", previous_response_id=first.id)
    third = await client.responses.create(model=server.model, input="Three?", previous_response_id=second.id)
    assert third.previous_response_id == second.id
    chat: list[Any] = [
        {"role": role, "content": content}
        for question in ("One?", "Two?")
        for role, content in (("user", question), ("assistant", words(8)))
    ]
    await client.chat.completions.create(model=server.model, messages=[*chat, {"role": "user", "content": "Three?"}])
    *_, as_response, as_chat = [claim.submission.prompt_token_ids for claim in worker.claims]
    assert as_response == as_chat


async def test_an_item_is_referred_to_by_its_id(client: AsyncOpenAI, server: Server, worker: PacedWorker) -> None:
    first = await client.responses.create(model=server.model, input="One?")
    items = await client.responses.input_items.list(first.id)
    reference: Any = [
        {"type": "item_reference", "id": items.data[0].id},
        {"type": "item_reference", "id": first.output[0].id},
        {"role": "user", "content": "Two?"},
    ]
    await client.responses.create(model=server.model, input=reference)
    await client.responses.create(model=server.model, input="Two?", previous_response_id=first.id)
    *_, referred, behind = [claim.submission.prompt_token_ids for claim in worker.claims]
    assert referred == behind


async def test_input_items_are_listed_in_pages(client: AsyncOpenAI, server: Server, worker: PacedWorker) -> None:
    items: Any = [{"role": "user", "content": f"{i}?"} for i in range(5)]
    response = await client.responses.create(model=server.model, input=items)
    page = client.responses.input_items.list(response.id, limit=2, order="asc")
    assert [_text(item) async for item in page] == [f"{i}?" for i in range(5)]
    newest = await client.responses.input_items.list(response.id, limit=1)
    assert newest.has_more
    assert _text(newest.data[0]) == "4?"


def _text(item: Any) -> str:
    return str(item.content[0].text)


async def test_it_is_cancelled_elsewhere(server: Server, http: httpx.AsyncClient, other: httpx.AsyncClient) -> None:
    async with working(server, length=10**6, pace=0.01):
        response = await created(http, server, background=True)
        while not (await retrieved(other, response["id"]))["output"]:
            pass
        cancelled = (await other.post(f"{URL}/{response['id']}/cancel")).json()
        assert cancelled["status"] == "cancelled"
        assert cancelled["output"][0]["content"][0]["text"].startswith(words(1))
        again = (await http.post(f"{URL}/{response['id']}/cancel")).json()
        assert again == cancelled == await retrieved(http, response["id"])


async def test_what_is_complete_cannot_be_cancelled(client: AsyncOpenAI, server: Server, worker: PacedWorker) -> None:
    response = await client.responses.create(model=server.model, input="Hi")
    with pytest.raises(openai.BadRequestError, match="completed"):
        await client.responses.cancel(response.id)


async def test_deleted_it_is_gone_with_all_it_was_made_from(
    server: Server, http: httpx.AsyncClient, client: AsyncOpenAI
) -> None:
    """Also one that is still being written: that ends."""
    async with working(server) as worker, connect(server.settings.redis_url) as redis:
        done = await created(http, server)
        worker.length = 10**6
        running = await created(http, server, background=True)
        for response in (done, running):
            await client.responses.delete(response["id"])
            relay_id = response["id"].removeprefix("resp_")
            refused(await http.get(f"{URL}/{response['id']}"), 404)
            async with asyncio.timeout(60):
                while await redis.exists(server.keys.request(relay_id), server.keys.log(relay_id)):
                    pass
            assert not await redis.exists(server.keys.response(relay_id))


async def test_what_is_not_stored_is_not_there(server: Server, http: httpx.AsyncClient, worker: PacedWorker) -> None:
    response = await created(http, server, store=False)
    assert response["store"] is False
    for method, path in PATHS:
        refused(await http.request(method, f"{URL}/{response['id']}{path}"), 404)


@pytest.mark.parametrize("id", ["resp_1", "resp_" + "f" * 32, "chatcmpl-" + "f" * 32])
async def test_what_never_was_is_not_there(http: httpx.AsyncClient, id: str) -> None:
    refused(await http.get(f"{URL}/{id}"), 404)


async def test_another_tenants_response_does_not_exist(
    api_settings: Settings, served_model: ServedModel, tmp_path: Path
) -> None:
    file = KeyFile(tmp_path / "keys.jsonl")
    keys = [file.create(name) for name in ("alice", "bob")]
    model = dataclasses.replace(served_model, name="shared")
    with keyed(api_settings, model, file) as server:
        async with working(server), asking_as(server, keys[0]) as alice, asking_as(server, keys[1]) as bob:
            response = await created(alice, server)
            assert await retrieved(alice, response["id"]) == response
            for method, path in PATHS:
                refused(await bob.request(method, f"{URL}/{response['id']}{path}"), 404)
            going_on = {"model": "shared", "input": "Hi", "previous_response_id": response["id"]}
            assert refused(await bob.post(URL, json=going_on))["code"] == "previous_response_not_found"
            reference = [{"type": "item_reference", "id": response["output"][0]["id"]}]
            assert refused(await bob.post(URL, json={"model": "shared", "input": reference}))["param"] == "input.0.id"
            assert await retrieved(alice, response["id"]) == response


async def test_the_oldest_make_room(url: str) -> None:
    """Sizes add up whatever is written, settled or deleted."""
    async with connect(url) as redis:
        keys = Keys("m")
        store = ResponseStore(redis, keys, Settings(response_store_mb=1))
        big = [{"text": "x" * (300 << 10)}]
        for name in "abcde":
            await store.put(name, "t", big)
            await store.settle(name, "{}")
        for name in "ab":
            with pytest.raises(NotFoundError):
                await store.get(name, "t")
        assert (await store.get("e", "t")).output == b"{}"
        await store.settle("a", "{}")  # too late
        for name in "cde":
            await store.forget(name)
        sizes: Any = await redis.hgetall(keys.response_sizes)
        assert sizes == {b"all": b"0"}
        assert not await redis.exists(keys.responses)


async def test_a_broker_that_is_full_keeps_no_more(url: str, served_model: ServedModel) -> None:
    async with connect(url) as redis:
        settings = Settings(redis_url=url)
        model = dataclasses.replace(served_model, name="full")
        limit: Any = await redis.config_get("maxmemory")
        with serving(settings, model) as full:
            await redis.config_set("maxmemory", 1 << 20)
            try:
                async with httpx.AsyncClient(base_url=full.base_url, timeout=60) as http:
                    refusal = await http.post(URL, json={"model": "full", "input": "Hi"})
                    assert refusal.status_code == 503
                    assert refusal.json()["error"]["code"] == "broker_unavailable"
            finally:
                await redis.config_set("maxmemory", limit["maxmemory"])
