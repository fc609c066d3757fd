"""Web pages of other origins: none may ask, unless a setting names them."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from pydantic import ValidationError

from tests.service.api.keyed import KeyFile, bearer, keyed
from tests.service.api.serving import Server
from tokenrelay.service.api.served_model import ServedModel
from tokenrelay.service.settings import Settings

CHAT = "/v1/chat/completions"


def preflight(server: Server, origin: str) -> httpx.Response:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    return httpx.options(server.base_url + CHAT, headers={"Origin": origin, **asked}, timeout=60)


def test_by_default_none_may(server: Server) -> None:
    assert preflight(server, "https://page.example").status_code == 405
    answer = httpx.get(f"{server.base_url}/v1/models", headers={"Origin": "https://page.example"}, timeout=60)
    assert "access-control-allow-origin" not in answer.headers


@pytest.fixture(scope="module")
def open_server(
    tmp_path_factory: pytest.TempPathFactory, api_settings: Settings, served_model: ServedModel
) -> Iterator[tuple[Server, str]]:
    """It names two, and wants keys, of which there is one."""
    file = KeyFile(tmp_path_factory.mktemp("keys") / "keys")
    secret = file.create("alice")
    origins = "https://page.example,http://localhost:3000"
    with keyed(api_settings, served_model, file, cors_origins=origins) as server:
        yield server, secret


class TestNamed:
    def test_their_browsers_are_answered_without_a_key(self, open_server: tuple[Server, str]) -> None:
        for origin in ("https://page.example", "http://localhost:3000"):
            answer = preflight(open_server[0], origin)
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, origin)
            assert "authorization" in answer.headers["access-control-allow-headers"].lower()

    def test_but_not_their_requests(self, open_server: tuple[Server, str]) -> None:
        server, secret = open_server
        origin = {"Origin": "https://page.example"}
        refused = httpx.get(f"{server.base_url}/v1/models", headers=origin, timeout=60)
        answered = httpx.get(f"{server.base_url}/v1/models", headers=origin | bearer(secret), timeout=60)
        assert (refused.status_code, answered.status_code) == (401, 200)
        for answer in (refused, answered):  # or the page could not read why
            assert answer.headers["access-control-allow-origin"] == "https://page.example"
            assert "x-ratelimit-remaining-tokens" in answer.headers["access-control-expose-headers"].lower()

    @pytest.mark.parametrize("origin", ["https://evil.example", "https://page.example.evil.example", "null"])
    def test_nor_any_other_page(self, open_server: tuple[Server, str], origin: str) -> None:
        answer = preflight(open_server[0], origin)
        assert answer.status_code == 400
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("origins", ["page.example", "https://page.example/", "https://*.example", "https://a b", "**"])
def test_what_is_no_origin_is_refused(origins: str) -> None:
    with pytest.raises(ValidationError, match="is not an origin"):
        Settings(cors_origins=origins)
