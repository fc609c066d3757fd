"""Strangers: with a file of keys, nobody gets in without one, whatever route, header or path they try."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from fastapi.routing import APIRoute

from tests.service.api.keyed import KeyFile, asking_as, bearer, keyed
from tests.service.api.serving import Server, refused, serving, wait_for, working
from tokenrelay.service.api.access.authentication import HEALTH
from tokenrelay.service.api.app import PARTS
from tokenrelay.service.api.served_model import ServedModel
from tokenrelay.service.key_file import ApiKeysError, revoke_api_key
from tokenrelay.service.settings import Settings

ROUTES = sorted(
    (method, route.path.replace("{id}", "0" * 32).replace("{model_id:path}", "m"))
    for part in PARTS
    for route in part.router.routes
    if isinstance(route, APIRoute)
    for method in route.methods or ()
)
OTHERS = [
    ("GET", path) for path in ("/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect", "/nowhere", "//livez")
]
PROTECTED = [(method, path) for method, path in (*ROUTES, *OTHERS) if path not in HEALTH]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> KeyFile:
    file = KeyFile(tmp_path_factory.mktemp("keys") / "keys.jsonl")
    for name in ("alice", "bob"):
        file.create(name)
    file.create("operator", operator=True)
    return file


@pytest.fixture(scope="module")
def running_server(api_settings: Settings, served_model: ServedModel, file: KeyFile) -> Iterator[Server]:
    with keyed(api_settings, served_model, file) as server:
        yield server


@pytest.fixture
async def alice(server: Server, file: KeyFile) -> AsyncIterator[httpx.AsyncClient]:
    async with asking_as(server, file.secrets["alice"]) as http:
        yield http


@pytest.mark.parametrize(("method", "path"), PROTECTED)
def test_no_route_answers_without_a_key(post: httpx.Client, method: str, path: str) -> None:
    for headers in ({}, bearer("tr-made-up"), {"x-api-key": "x"}):
        response = post.request(method, path, headers=headers)
        assert response.status_code == 401
        error = response.json()["error"]  # in the route's own shape: Ollama's is a text
        assert "API key" in (error if path.startswith("/api/") else error["message"])
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("path", sorted(HEALTH))
def test_health_needs_none(post: httpx.Client, path: str) -> None:
    assert post.get(path).status_code in (200, 503)


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Basic {}",
        "{}",
        "Token {}",
        "Bearer {}x",
        "Bearer x{}",
        "Bearer {} {}",
        "Bearer Bearer {}",
    ],
)
def test_what_is_not_quite_a_key_is_none(post: httpx.Client, file: KeyFile, authorization: str) -> None:
    secret = file.secrets["alice"]
    refused(post.get("/v1/models", headers={"Authorization": authorization.replace("{}", secret)}), 401)


@pytest.mark.parametrize("name", ["Authorization", "x-api-key"])
def test_bytes_that_are_no_text_are_no_key(post: httpx.Client, name: str) -> None:
    refused(post.get("/v1/models", headers={name.encode(): b"Bearer \xff\xfe\x80"}), 401)


def test_a_key_gets_in_by_either_header(post: httpx.Client, file: KeyFile) -> None:
    secret = file.secrets["alice"]
    for headers in (bearer(secret), {"authorization": f"bearer {secret}"}, {"x-api-key": secret}):
        assert post.get("/v1/models", headers=headers).status_code == 200
        assert post.get("/docs", headers=headers).status_code == 200
    both = {"Authorization": "Bearer made-up", "x-api-key": secret}
    assert post.get("/v1/models", headers=both).status_code == 200


def test_metrics_are_for_operators(post: httpx.Client, file: KeyFile) -> None:
    assert refused(post.get("/metrics", headers=bearer(file.secrets["alice"])), 403)["code"] == "forbidden"
    assert post.get("/metrics", headers=bearer(file.secrets["operator"])).status_code == 200


def test_metrics_may_be_public(api_settings: Settings, served_model: ServedModel, file: KeyFile) -> None:
    with keyed(api_settings, served_model, file, metrics_need_key=False) as server:
        assert httpx.get(f"{server.base_url}/metrics", timeout=60).status_code == 200
        assert httpx.get(f"{server.base_url}/v1/models", timeout=60).status_code == 401


def test_openai_s_client_gets_in_or_is_told_why_not(server: Server, file: KeyFile) -> None:
    for secret, error in (("wrong", openai.AuthenticationError), (file.secrets["alice"], None)):
        with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key=secret, max_retries=0) as client:
            if error:
                with pytest.raises(error):
                    client.models.list()
            else:
                assert client.models.list().data


class TestReloading:
    @pytest.fixture
    def mine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KeyFile:
        monkeypatch.setattr("tokenrelay.service.api.access.keyring.POLL_SECONDS", 0.02)
        file = KeyFile(tmp_path / "keys.jsonl")
        file.create("first")
        return file

    @pytest.fixture
    def other(self, api_settings: Settings, served_model: ServedModel, mine: KeyFile) -> Iterator[Server]:
        with keyed(api_settings, served_model, mine, metrics_need_key=False) as server:
            yield server

    def test_a_key_comes_and_goes_without_a_restart(self, other: Server, mine: KeyFile) -> None:
        secret = mine.create("second")
        wait_for(lambda: status(other, secret) == 200)
        revoke_api_key(mine.path, "second")
        wait_for(lambda: status(other, secret) == 401)
        assert status(other, mine.secrets["first"]) == 200

    @pytest.mark.parametrize("content", ["{", '{"name": "x"}', None], ids=["cut", "incomplete", "gone"])
    def test_a_broken_file_leaves_the_keys_as_they_were(
        self, other: Server, mine: KeyFile, content: str | None
    ) -> None:
        if content is None:
            mine.path.unlink()
        else:
            whole = mine.path.with_suffix(
                ".whole"
            )  # written in place it is empty for a moment: no keys, which is valid
            whole.write_text(content)
            whole.replace(mine.path)
        wait_for(lambda: broken(other) == 1)
        assert status(other, mine.secrets["first"]) == 200
        mine.path.unlink(missing_ok=True)
        third = mine.create("third")
        wait_for(lambda: status(other, third) == 200)
        assert broken(other) == 0
        assert status(other, mine.secrets["first"]) == 401

    def test_without_any_key_left_nobody_gets_in(self, other: Server, mine: KeyFile) -> None:
        revoke_api_key(mine.path, "first")
        wait_for(lambda: status(other, mine.secrets["first"]) == 401)
        assert httpx.get(f"{other.base_url}/v1/models", timeout=60).status_code == 401


def status(server: Server, secret: str) -> int:
    return httpx.get(f"{server.base_url}/v1/models", headers=bearer(secret), timeout=60).status_code


def broken(server: Server) -> float | None:
    return server.metrics.get_sample_value("tokenrelay_api_keys_broken", {"model_name": server.model})


def test_a_server_does_not_start_with_a_file_that_is_no_use(
    api_settings: Settings, served_model: ServedModel, tmp_path: Path
) -> None:
    with (
        pytest.raises(ApiKeysError, match="No such file"),
        keyed(api_settings, served_model, KeyFile(tmp_path / "nowhere")),
    ):
        pass


class TestTenants:
    """What another tenant asked for is not there."""

    async def test_requests_of_others_cannot_be_seen_read_or_ended(
        self, server: Server, alice: httpx.AsyncClient, file: KeyFile
    ) -> None:
        body = {"model": server.model, "prompt": ["Once", "Twice"]}
        async with working(server), asking_as(server, file.secrets["bob"]) as bob:
            mine = (await alice.post("/v1/completions", json=body)).json()["id"]
            for name in (mine, mine.removeprefix("cmpl-")):
                attempts = [
                    await bob.get(f"/v1/requests/{name}"),
                    await bob.get(f"/v1/requests/{name}/stream"),
                    await bob.post(f"/v1/requests/{name}/cancel"),
                    await bob.delete(f"/v1/requests/{name}"),
                ]
                never = await bob.get(f"/v1/requests/{'0' * 32}")
                for attempt in attempts:
                    assert refused(attempt, 404)["code"] == refused(never, 404)["code"]
                assert (await alice.get(f"/v1/requests/{name}")).json()["outcome"] == "stop"

    async def test_equal_idempotency_keys_stand_for_different_requests(
        self, server: Server, alice: httpx.AsyncClient, file: KeyFile
    ) -> None:
        body = {"model": server.model, "prompt": "Once"}
        async with working(server) as worker, asking_as(server, file.secrets["bob"]) as bob:
            for client in (alice, bob, alice):
                answer = await client.post("/v1/completions", json=body, headers={"Idempotency-Key": "same"})
                assert answer.status_code == 200
        assert [claim.submission.tenant for claim in worker.claims] == ["alice", "bob"]


def test_without_a_file_nobody_needs_a_key(api_settings: Settings, served_model: ServedModel) -> None:
    with serving(api_settings, served_model) as server, httpx.Client(base_url=server.base_url, timeout=60) as client:
        for path in ("/v1/models", "/metrics", "/docs"):
            assert client.get(path).status_code == client.get(path, headers=bearer("any")).status_code == 200
