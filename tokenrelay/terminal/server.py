"""A server that speaks OpenAI's protocol, over the standard library's HTTP: one connection per request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tokenrelay.terminal.errors import TerminalError, Unreachable

SILENCE_SECONDS = 60.0  # ours says something every 15, so a connection that is silent for longer is dead
PATIENCE_SECONDS = 600.0  # with others


class Model(NamedTuple):
    """What is served there. ``resumes``: the server is one of ours, whose streams can be read on."""

    name: str
    resumes: bool


class Server:
    """At a URL with or without ``/v1``."""

    def __init__(self, url: str, api_key: str = "") -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise TerminalError(f"{url!r} is no URL of a server; give one like http://127.0.0.1:8000")
        self.url = url
        self._connect = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._address = parts.hostname, parts.port
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json", "User-Agent": "tokenrelay-terminal", "Connection": "close"}
        self._headers |= {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def model(self, name: str = "") -> Model:
        """The one of this name, or the first that the server lists."""
        with self.open("GET", "/v1/models") as response:
            try:
                listed = {model["id"]: model.get("owned_by") for model in json.load(response)["data"]}
            except (ValueError, KeyError, TypeError, HTTPException) as error:
                raise TerminalError(f"{self.url} does not answer like a server with OpenAI's routes") from error
        found = name or next(iter(listed), "")
        if found not in listed:
            raise TerminalError(f"no model {found!r} at {self.url}; it has: {', '.join(listed) or 'none'}")
        return Model(found, listed[found] == "tokenrelay")

    def open(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = PATIENCE_SECONDS,
    ) -> HTTPResponse:
        """An answer that is a success. Raises Unreachable, or TerminalError with what the server said."""
        connection = self._connect(*self._address, timeout=timeout)
        content = None if body is None else json.dumps(body).encode()
        try:
            connection.request(method, self._prefix + path, content, self._headers | dict(headers or {}))
            response = connection.getresponse()
            if response.status >= 300:
                raise TerminalError(f"{response.status}: {_said(response.read())}")
        except (OSError, HTTPException) as error:
            connection.close()
            raise Unreachable(f"no server answers at {self.url} ({error}); start one with: tokenrelay serve") from error
        except BaseException:
            connection.close()
            raise
        return response


def _said(body: bytes) -> str:
    """The message in an error's body, or the body."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace").strip()[:300]
