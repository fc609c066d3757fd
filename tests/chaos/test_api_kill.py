"""An API process is killed in the middle of its streams: each goes on at another, and its text is whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx_sse import aconnect_sse

from tests.chaos.conftest import EIGHT
from tests.chaos.pauses import percentile
from tests.chaos.streams import Body, Recording, have_begun, read, read_all_while, read_rest, resumption
from tests.service.api.serving import Endpoint, api_process, words, working
from tests.service.running import MODEL, RunningService, wait_until
from tokenrelay.service.embedded_valkey import EmbeddedValkey
from tokenrelay.service.settings import Settings

NUM_STREAMS = 8
NUM_TOKENS = 80
PACE = 0.05  # seconds per token: the worker, the clients and the test share one core
KILLED_AFTER = 5  # chunks
RESUMED_WITHIN = 0.1  # seconds from the new request to its first chunk
ATTEMPTS = 6  # one of them in time: others may have the processor meanwhile

# --- two processes, and a paced worker --------------------------------------------------------------------------------


@pytest.fixture
async def endpoints(valkey: EmbeddedValkey, smollm2_path: Path) -> AsyncIterator[list[tuple[Any, Endpoint]]]:
    """Two API processes at one broker."""
    settings = Settings(redis_url=valkey.url, model=str(smollm2_path), served_model_name=MODEL, max_model_len=2048)
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(api_process(settings, MODEL)) for _ in range(2)]


async def test_a_stream_goes_on_at_another_process(endpoints: list[tuple[Any, Endpoint]]) -> None:
    """Whatever the client's leaving would mean: a process that died did not say that its client left."""
    (victim, first), (_, second) = endpoints
    clients = [Recording() for _ in range(NUM_STREAMS)]
    gates = [asyncio.Event() for _ in clients]
    async with (
        working(first, length=NUM_TOKENS, pace=PACE),
        httpx.AsyncClient(base_url=second.base_url, timeout=60) as http,
    ):
        await http.post("/v1/completions", json={"model": MODEL, "prompt": "One", "max_tokens": 1})  # warms up
        begun = [asyncio.create_task(begin(first, *pair)) for pair in zip(clients, gates, strict=True)]
        await asyncio.gather(*(gate.wait() for gate in gates))
        victim.kill()
        await asyncio.gather(*begun)
        assert not any(client.done for client in clients)
        delays = await asyncio.gather(*(go_on(http, client) for client in clients))
        for _ in range(ATTEMPTS):
            delays += [await go_on(http, Recording(client.request_id)) for client in clients[:1]]
    for client in clients:
        client.assert_whole()
        assert (client.text, client.choices[0].finish_reason) == (words(NUM_TOKENS), "length")
    print(f"{len(delays)} at once; first chunk: p50 {percentile(delays, 50):.3f} s, worst {max(delays):.3f} s")
    assert min(delays) < RESUMED_WITHIN, sorted(delays)


async def begin(endpoint: Endpoint, client: Recording, far_enough: asyncio.Event) -> None:
    """Read until the connection breaks."""
    body = {"model": endpoint.model, "prompt": "Once", "stream": True, "max_tokens": NUM_TOKENS}
    with suppress(httpx.TransportError):
        async with (
            httpx.AsyncClient(base_url=endpoint.base_url, timeout=60) as http,
            aconnect_sse(http, "POST", "/v1/completions", json=body) as source,
        ):
            async for event in source.aiter_sse():
                client.take(event)
                if client.num_chunks == KILLED_AFTER:
                    far_enough.set()


async def go_on(http: httpx.AsyncClient, client: Recording) -> float:
    """Read the rest. Returns the seconds until its first chunk."""
    url, headers = resumption(client)
    delay, asked_at = 0.0, time.monotonic()
    async with aconnect_sse(http, "GET", url, headers=headers) as source:
        async for event in source.aiter_sse():
            delay = delay or time.monotonic() - asked_at
            client.take(event)
    assert client.done
    return delay


# --- the whole service, with the real model ---------------------------------------------------------------------------

SEVERAL_PROMPTS: Body = {
    "prompt": ["Dear Sir or Madam,", "Once upon a time"],
    "max_tokens": 40,
    "temperature": 1,
    "seed": 9,
}


def test_texts_are_those_of_the_undisturbed_run(service: RunningService, undisturbed: list[Recording]) -> None:
    """Whatever was asked for; also several prompts in one request. The supervisor starts the next process."""

    def kill(recordings: Sequence[Recording]) -> None:
        wait_until(lambda: have_begun(recordings, 2), "all streams have begun")
        service.kill("api")

    with httpx.Client(base_url=service.url, timeout=60) as http:
        expected = [*undisturbed, read(http, SEVERAL_PROMPTS)]
        recordings = read_all_while(http, [*EIGHT, SEVERAL_PROMPTS], kill)
        interrupted = [recording for recording in recordings if not recording.done]
        assert interrupted  # some may have ended before
        wait_until(service.is_ready, "the next API process")
        with ThreadPoolExecutor(len(interrupted)) as pool:
            list(pool.map(lambda recording: read_rest(http, recording), interrupted))
    for recording, whole in zip(recordings, expected, strict=True):
        recording.assert_whole()
        assert recording.choices == whole.choices
