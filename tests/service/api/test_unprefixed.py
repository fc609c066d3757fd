"""Every route below /v1 answers without it, too: the same, and under the same lock."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from fastapi.routing import APIRoute
from starlette.types import Message, Receive, Scope, Send

from tests.service.api.keyed import KeyFile, bearer, keyed
from tests.service.api.serving import Server, working
from tokenrelay.service.api.app import PARTS
from tokenrelay.service.api.http.unprefixed import UnprefixedMiddleware
from tokenrelay.service.api.served_model import ServedModel
from tokenrelay.service.settings import Settings

ROUTES = sorted(
    (method, route.path.replace("{id}", "0" * 32).replace("{model_id:path}", "any/model"))
    for part in PARTS
    for route in part.router.routes
    if isinstance(route, APIRoute)
    for method in route.methods or ()
)
BELOW_V1 = [(method, path) for method, path in ROUTES if path.startswith("/v1/")]


@pytest.fixture(scope="module")
def locked(
    tmp_path_factory: pytest.TempPathFactory, api_settings: Settings, served_model: ServedModel
) -> Iterator[tuple[Server, str]]:
    file = KeyFile(tmp_path_factory.mktemp("keys") / "keys.jsonl")
    secret = file.create("any")
    with keyed(api_settings, served_model, file) as server:
        yield server, secret


@pytest.mark.parametrize(("method", "path"), BELOW_V1)
def test_it_answers_the_same(locked: tuple[Server, str], method: str, path: str) -> None:
    server, secret = locked
    for headers in ({}, bearer(secret)):
        with httpx.Client(base_url=server.base_url, headers=headers, timeout=60) as client:
            prefixed, short = (client.request(method, p, json={}) for p in (path, path.removeprefix("/v1")))
        assert (short.status_code, short.content) == (prefixed.status_code, prefixed.content)
    assert "There is no route" not in short.text


@pytest.mark.parametrize("path", sorted({path for _, path in ROUTES if not path.startswith("/v1/")}))
def test_the_others_keep_their_names(post: httpx.Client, path: str) -> None:
    assert post.get(f"/v1{path}").status_code == 404


async def test_a_client_that_leaves_it_out(server: Server, http: httpx.AsyncClient) -> None:
    body = {"model": server.model, "messages": [{"role": "user", "content": "Hi"}]}
    async with working(server):
        answer = (await http.post("/chat/completions", json=body)).json()
    assert answer["object"] == "chat.completion"
    assert (await http.get(f"/requests/{answer['id']}")).json()["outcome"] == "stop"


async def seen(path: str) -> tuple[str, bytes]:
    scopes: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(scope)

    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        raise AssertionError

    middleware = UnprefixedMiddleware(app, ["/v1/models/{id}", "/v1/health", "/health", "/metrics"])
    scope = {"type": "http", "path": path, "raw_path": path.encode()}
    await middleware(scope, receive, send)
    return scopes[0]["path"], scopes[0]["raw_path"]


@pytest.mark.parametrize(
    ("path", "completed"),
    [
        ("/models/x", "/v1/models/x"),
        ("/models", "/v1/models"),
        ("/v1/models/x", "/v1/models/x"),
        ("/health", "/health"),
        ("/metrics", "/metrics"),
        ("/", "/"),
        ("//models", "//models"),
        ("/v1//models", "/v1//models"),
        ("/modelss", "/modelss"),
        ("/models/../metrics", "/v1/models/../metrics"),
    ],
)
async def test_only_what_is_below_v1_is_completed(path: str, completed: str) -> None:
    assert await seen(path) == (completed, completed.encode())
