"""A client reports what a server does to it, and never raises in the middle of a run."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from tests.bench.conftest import Say
from tests.bench.test_stream import END, USAGE, text
from tests.service.api.serving import Server, wait_for, working
from tests.service.running import free_port
from tokenrelay.bench.client import Client
from tokenrelay.bench.exchange import Origin
from tokenrelay.bench.measured import Measured, TargetError
from tokenrelay.bench.workload import Workload

OK = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"


def answer(status: str, body: bytes) -> bytes:
    return b"HTTP/1.1 %b\r\ncontent-length: %d\r\n\r\n%b" % (status.encode(), len(body), body)


async def complete(url: str) -> Measured:
    return await Client(url, timeout=60).complete(b"{}", Measured(time.perf_counter()))


async def test_it_measures_the_real_api(running_server: Server) -> None:
    client, workload = Client(running_server.base_url), Workload(prompt_tokens=20, output_tokens=6)
    async with working(running_server):
        model = await client.first_model()
        body = workload.body(model, workload.prompt(random.Random(0)))
        measured = await client.complete(body, Measured(time.perf_counter()))
    assert model == running_server.model
    assert measured.error == ""
    assert (measured.prompt_tokens, measured.output_tokens) == (20, 6)
    assert len(measured.arrivals) == 6
    assert measured.started < measured.arrivals[0] <= measured.arrivals[-1] <= measured.ended


async def test_a_refusal_is_the_servers_message(running_server: Server) -> None:
    body = Workload().body("another-model", "Hello")
    measured = await Client(running_server.base_url).complete(body, Measured(0.0))
    assert measured.error.startswith("404: ")
    assert "another-model" in measured.error
    assert not measured.refused


@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Service Unavailable"])
async def test_no_room_is_told_from_failure(say: Say, status: str) -> None:
    measured = await complete(await say(answer(status, b'{"error": {"message": "come back later"}}')))
    assert measured.refused
    assert measured.error == f"{status[:3]}: come back later"


@pytest.mark.parametrize("body", [b"no such thing", b'{"detail": "no such thing"}', b'{"error": "no such thing"}'])
async def test_errors_of_any_shape_are_shown(say: Say, body: bytes) -> None:
    assert (await complete(await say(answer("400 Bad Request", body)))).error == "400: no such thing"


async def test_a_stream_may_end_with_the_connection(say: Say) -> None:
    measured = await complete(await say(OK + b"\r\n", text("a"), text("b"), USAGE + END))
    assert (measured.error, len(measured.arrivals), measured.output_tokens) == ("", 2, 5)


async def test_a_stream_that_breaks_is_an_error(say: Say) -> None:
    chunk = text("a")
    measured = await complete(await say(OK + b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(chunk), chunk)))
    assert measured.error
    assert len(measured.arrivals) == 1


@pytest.mark.parametrize("nonsense", [b"hello\r\n\r\n", OK + b"\r\ndata: {nonsense\n\n", b""])
async def test_nonsense_is_an_error(say: Say, nonsense: bytes) -> None:
    assert (await complete(await say(nonsense))).error


async def test_a_stream_without_output_is_an_error(say: Say) -> None:
    assert (await complete(await say(OK + b"\r\n", END))).error == "the stream had no output"


async def test_a_silent_server_is_an_error_in_time(running_server: Server) -> None:
    async with working(running_server, held_back=True) as worker:
        body = Workload().body(running_server.model, "Hello")
        measured = await Client(running_server.base_url, timeout=0.3).complete(body, Measured(0.0))
        await asyncio.to_thread(wait_for, lambda: worker.cancelled)  # the connection was closed: nobody waits
        worker.gate.set()
    assert "0.3 s" in measured.error


async def test_nobody_there_is_an_error() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert (await complete(url)).error
    with pytest.raises(TargetError, match=url):
        await Client(url).first_model()


async def test_the_key_is_sent(running_server: Server) -> None:
    received = bytearray()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.extend(await reader.readuntil(b"\r\n\r\n"))
        writer.close()

    async with await asyncio.start_server(listen, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        await Client(f"http://127.0.0.1:{port}/proxy/v1/", api_key="secret").complete(b"{}", Measured(0.0))
    assert received.startswith(b"POST /proxy/v1/completions HTTP/1.1\r\n")
    assert b"authorization: Bearer secret\r\n" in received.lower().replace(b"bearer", b"Bearer")


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("http://here:8000", Origin("here", 8000, False, "")),
        ("http://here:8000/v1", Origin("here", 8000, False, "")),
        ("https://there/api/v1/", Origin("there", 443, True, "/api")),
    ],
)
def test_urls(url: str, origin: Origin) -> None:
    assert Origin.of(url) == origin


def test_an_address_has_brackets_in_the_header_only() -> None:
    origin = Origin.of("http://[::1]:8000")
    assert (origin.host, origin.authority) == ("::1", "[::1]:8000")
