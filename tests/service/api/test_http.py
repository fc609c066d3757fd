"""HTTP itself: media types, sizes, methods, request ids."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from tests.service.api.serving import JSON, Server, refused

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_only_json_is_read(server: Server, post: httpx.Client, content_type: str) -> None:
    body = json.dumps({"model": server.model, "prompt": "Hi"}).encode()
    response = post.post(COMPLETIONS, content=body, headers={"content-type": content_type})
    assert refused(response, 415)["code"] == "unsupported_media_type"


def test_compressed_bodies_are_refused(post: httpx.Client) -> None:
    refused(post.post(COMPLETIONS, content=b"\x1f\x8b", headers={**JSON, "content-encoding": "gzip"}), 415)


def test_routes_and_methods_that_are_not_there(post: httpx.Client) -> None:
    assert refused(post.post("/v1/audio/speech", json={}), 404)["code"] == "not_found"
    refused(post.get("/v1/models/"), 404)
    response = post.get(CHAT)
    assert refused(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"
    assert post.put("/v1/requests/a").headers["allow"] == "GET, DELETE"
    refused(post.delete("/v1/models"), 405)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_beyond_the_limit_is_413(server: Server, post: httpx.Client, chunked: bool) -> None:
    body = b'{"prompt": "' + b"x" * server.settings.max_body_bytes + b'"}'
    content = (body[i : i + 65536] for i in range(0, len(body), 65536)) if chunked else body
    assert refused(post.post(COMPLETIONS, content=content, headers=JSON), 413)["code"] == "request_too_large"


async def test_a_body_that_does_not_arrive_is_408(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenrelay.service.api.http.body.BODY_SECONDS", 0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
    )
    assert b" 408 " in await reader.readline()
    writer.close()
    await writer.wait_closed()


def test_request_ids_are_echoed_if_they_are_sane(post: httpx.Client) -> None:
    assert post.get("/livez", headers={"x-request-id": "trace-1"}).headers["x-request-id"] == "trace-1"
    for bad in (b"x" * 129, b"two words", "é".encode("latin-1")):
        given_back = post.get("/livez", headers={b"x-request-id": bad}).headers["x-request-id"]
        assert len(given_back) == 32
