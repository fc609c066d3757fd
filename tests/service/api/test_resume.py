"""A stream that broke goes on where it broke: nothing twice, nothing missing, at whichever process."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from typing import Any, NamedTuple

import httpx
import pytest
from httpx_sse import ServerSentEvent, aconnect_sse

from tests.service.api.conftest import accepted, ended
from tests.service.api.serving import PacedWorker, Server, refused, sse_events, wait_for, words, working
from tokenrelay.service.messages import Error

DONE = "[DONE]"
Body = dict[str, Any]

CHAT: Body = {"messages": [{"role": "user", "content": "Hi"}]}
USAGE: Body = {"stream_options": {"include_usage": True}}
BODIES: dict[str, Body] = {
    "chat": CHAT,
    "chat with everything": {
        **{**CHAT, **USAGE, "n": 2, "logprobs": True, "top_logprobs": 2},
        **{"prompt_logprobs": 1, "return_token_ids": True},
    },
    "completion": {"prompt": "Once"},
    "completion with everything": {
        **{**USAGE, "prompt": "Once upon", "n": 2, "echo": True, "logprobs": 2},
        **{"return_token_ids": True, "return_tokens_as_token_ids": True},
    },
    "scored prompt": {"prompt": [1, 2, 3], "echo": True, "logprobs": 0, "max_tokens": 0},
}


class Chunk(NamedTuple):
    """One message of a stream. ``id`` is empty for [DONE]."""

    id: str
    data: str


def route_of(body: Body) -> str:
    return "/v1/chat/completions" if "messages" in body else "/v1/completions"


def chunks_of(response: httpx.Response) -> list[Chunk]:
    assert response.status_code == 200, response.text
    return [chunk_of(event) for event in sse_events(response.text)]


def chunk_of(event: dict[str, str]) -> Chunk:
    return Chunk("" if event["data"] == DONE else event["id"], event["data"])


async def streamed(http: httpx.AsyncClient, server: Server, body: Body) -> tuple[str, list[Chunk]]:
    """The answer's id and its whole stream."""
    response = await http.post(route_of(body), json={"model": server.model, "stream": True, **body})
    chunks = chunks_of(response)
    assert json.loads(chunks[0].data)["id"] == response.headers["x-response-id"]
    return response.headers["x-response-id"], chunks


async def resumed(http: httpx.AsyncClient, answer_id: str, after: str) -> list[Chunk]:
    return chunks_of(await http.get(f"/v1/requests/{answer_id}/stream", params={"starting_after": after}))


def texts(chunks: list[Chunk]) -> dict[int, str]:
    """By choice."""
    found: dict[int, str] = defaultdict(str)
    for chunk in chunks[:-1]:
        for choice in json.loads(chunk.data)["choices"]:
            found[choice["index"]] += choice.get("text") or choice.get("delta", {}).get("content") or ""
    return found


@pytest.mark.parametrize("body", BODIES.values(), ids=list(BODIES))
async def test_behind_any_chunk_it_reads_on_as_if_it_had_not_broken(
    server: Server, http: httpx.AsyncClient, worker: PacedWorker, body: Body
) -> None:
    answer_id, whole = await streamed(http, server, body)
    assert whole[-1].data == DONE
    assert len({chunk.id for chunk in whole}) == len(whole)
    assert await resumed(http, answer_id, "0") == whole
    for i, chunk in enumerate(whole[:-1], 1):
        assert await resumed(http, answer_id, chunk.id) == whole[i:]


async def test_of_several_prompts_every_choice_has_its_text_wherever_it_broke(
    server: Server, http: httpx.AsyncClient, worker: PacedWorker
) -> None:
    """They may come interleaved otherwise the second time; what counts is each one's order."""
    answer_id, whole = await streamed(http, server, {"prompt": ["a", "b"], "n": 2, "logprobs": 1, **USAGE})
    for i, chunk in enumerate(whole[:-1], 1):
        rest = await resumed(http, answer_id, chunk.id)
        stitched = whole[:i] + rest
        assert texts(stitched) == texts(whole) == dict.fromkeys(range(4), words(8))
        assert sorted(data for _, data in stitched) == sorted(data for _, data in whole)
        assert rest[-1].data == DONE


async def test_a_stream_that_breaks_at_every_chunk_while_it_is_generated(
    server: Server, http: httpx.AsyncClient
) -> None:
    """And a worker that writes on meanwhile."""
    body = {"model": server.model, "stream": True, "on_disconnect": "continue", "n": 2, **CHAT}
    async with working(server, length=20, pace=0.002):
        async with http.stream("POST", route_of(body), json=body) as response:
            answer_id, seen = response.headers["x-response-id"], [await first_message(response)]
        while seen[-1].data != DONE:
            url = f"{server.base_url}/v1/requests/{answer_id}/stream"
            async with http.stream("GET", url, headers={"Last-Event-ID": seen[-1].id}) as response:
                seen.append(await first_message(response))
        assert seen == await resumed(http, answer_id, "0")
    assert texts(seen) == {0: words(20), 1: words(20)}


async def first_message(response: httpx.Response) -> Chunk:
    text = ""
    async for piece in response.aiter_text():
        text += piece
        if "\n\n" in text:
            break
    return chunk_of(sse_events(text[: text.index("\n\n") + 2])[0])


async def test_a_reader_from_elsewhere_follows_live(server: Server, http: httpx.AsyncClient) -> None:
    async with working(server, length=30, held_back=True) as worker:
        first = asyncio.create_task(streamed(http, server, {"prompt": "Once"}))
        await asyncio.to_thread(wait_for, lambda: worker.claims)
        relay_id = worker.claims[0].submission.request_id
        second = asyncio.create_task(resumed(http, relay_id, "0"))  # the bare id will do
        await asyncio.to_thread(wait_for, lambda: server.process.generations._num_readers[relay_id] == 2)
        worker.gate.set()
        _, whole = await first
        assert await second == whole


async def test_a_third_party_client_reads_it(server: Server, http: httpx.AsyncClient, worker: PacedWorker) -> None:
    """httpx-sse parses as browsers do: what it says the last id is, is what a browser would send."""
    answer_id, whole = await streamed(http, server, CHAT)
    headers = {"Last-Event-ID": whole[2].id}
    async with aconnect_sse(http, "GET", f"/v1/requests/{answer_id}/stream", headers=headers) as source:
        events: list[ServerSentEvent] = [event async for event in source.aiter_sse()]
    assert [event.data for event in events] == [chunk.data for chunk in whole[3:]]
    assert [event.id for event in events] == [chunk.id for chunk in whole[3:-1]] + ["done"]
    assert events[0].retry == 1000
    assert {event.event for event in events} == {"message"}


async def test_a_browser_that_has_everything_is_told_not_to_come_back(
    server: Server, http: httpx.AsyncClient, worker: PacedWorker
) -> None:
    """An EventSource reconnects by itself, also after [DONE]: with that message's id."""
    answer_id, _ = await streamed(http, server, CHAT)
    response = await http.get(f"/v1/requests/{answer_id}/stream", headers={"Last-Event-ID": "done"})
    assert (response.status_code, response.content) == (204, b"")


async def test_the_header_counts_before_the_query(server: Server, http: httpx.AsyncClient, worker: PacedWorker) -> None:
    """A browser reconnects to the URL it was given, query and all."""
    answer_id, whole = await streamed(http, server, CHAT)
    url = f"/v1/requests/{answer_id}/stream?starting_after={whole[1].id}"
    assert chunks_of(await http.get(url)) == whole[2:]
    assert chunks_of(await http.get(url, headers={"Last-Event-ID": whole[5].id})) == whole[6:]


async def test_an_answer_that_was_not_streamed_has_a_stream_too(
    server: Server, http: httpx.AsyncClient, worker: PacedWorker
) -> None:
    response = await http.post("/v1/chat/completions", json={"model": server.model, **CHAT})
    assert texts(await resumed(http, response.json()["id"], "0")) == {0: words(8)}


async def test_the_error_that_ended_a_request_ends_every_reading_of_it(server: Server, http: httpx.AsyncClient) -> None:
    async with working(server, error=Error(message="Lost.", code="worker_lost")):
        answer_id, whole = await streamed_to_failure(http, server)
    for i, chunk in enumerate(whole[:-2], 1):
        assert [data for _, data in await resumed_to_failure(http, answer_id, chunk.id)] == whole_data(whole)[i:]


async def streamed_to_failure(http: httpx.AsyncClient, server: Server) -> tuple[str, list[Chunk]]:
    response = await http.post("/v1/chat/completions", json={"model": server.model, "stream": True, **CHAT})
    return response.headers["x-response-id"], with_errors(response)


async def resumed_to_failure(http: httpx.AsyncClient, answer_id: str, after: str) -> list[Chunk]:
    return with_errors(await http.get(f"/v1/requests/{answer_id}/stream", params={"starting_after": after}))


def with_errors(response: httpx.Response) -> list[Chunk]:
    chunks = [Chunk(event.get("id", ""), event["data"]) for event in sse_events(response.text)]
    assert "worker_lost" in chunks[-2].data
    return chunks


def whole_data(chunks: list[Chunk]) -> list[str]:
    return [chunk.data for chunk in chunks]


async def test_reading_again_is_counted_and_accepts_nothing(
    server: Server, http: httpx.AsyncClient, worker: PacedWorker
) -> None:
    joined = server.process.metrics.streams_joined
    answer_id, _ = await streamed(http, server, CHAT)
    before = accepted(server), ended(server), joined._value.get()
    await resumed(http, answer_id, "0")
    assert (accepted(server), ended(server), joined._value.get()) == (before[0], before[1], before[2] + 1)


class TestRefused:
    @pytest.mark.parametrize("name", ["0" * 32, "chatcmpl-" + "0" * 32, "x", "chatcmpl-", "a:b", "0" * 32 + "-0"])
    @pytest.mark.parametrize("route", ["", "/stream"])
    async def test_an_unknown_id(self, server: Server, http: httpx.AsyncClient, name: str, route: str) -> None:
        assert refused(await http.get(f"/v1/requests/{name}{route}"), 404)["code"] == "not_found"

    async def test_a_forgotten_request(self, server: Server, http: httpx.AsyncClient, worker: PacedWorker) -> None:
        """As if the retention were over."""
        answer_id, _ = await streamed(http, server, CHAT)
        keys, relay_id = server.keys, answer_id.removeprefix("chatcmpl-")
        await worker.queue._redis.delete(keys.request(relay_id), keys.log(relay_id))
        refused(await http.get(f"/v1/requests/{answer_id}/stream"), 404)

    @pytest.mark.parametrize("after", ["x", "-1", "1.", ".1", "1,2", "1.1.1", "9" * 100, "1 ", "1e3", "٣"])
    async def test_an_id_that_no_chunk_had(
        self, server: Server, http: httpx.AsyncClient, worker: PacedWorker, after: str
    ) -> None:
        answer_id, _ = await streamed(http, server, CHAT)
        url = f"/v1/requests/{answer_id}/stream"
        assert refused(await http.get(url, params={"starting_after": after}))["param"] == "starting_after"
        if after == after.strip():  # HTTP forbids the others in a header
            header = [(b"last-event-id", after.encode())]
            assert refused(await http.get(url, headers=header))["param"] == "Last-Event-ID"

    async def test_an_id_behind_the_end_has_nothing_but_done(
        self, server: Server, http: httpx.AsyncClient, worker: PacedWorker
    ) -> None:
        answer_id, _ = await streamed(http, server, CHAT)
        assert await resumed(http, answer_id, "999") == [Chunk("", DONE)]

    async def test_choices_of_which_the_best_are_kept_have_no_stream(
        self, server: Server, http: httpx.AsyncClient, worker: PacedWorker
    ) -> None:
        response = await http.post("/v1/completions", json={"model": server.model, "prompt": "a", "best_of": 2})
        error = refused(await http.get(f"/v1/requests/{response.json()['id']}/stream"))
        assert "best_of" in error["message"]
