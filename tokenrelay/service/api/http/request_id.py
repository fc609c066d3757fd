"""Gives every HTTP request an id, the client's own if it sent one, and every response the header that says it.

The id is for correlation only. What the broker calls a request is always drawn here, so that no client can name,
guess or collide with another's.
"""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "X-Request-Id"
ANTHROPICS_HEADER = "request-id"  # where Anthropic's clients look for it
_ACCEPTABLE = re.compile(r"[\x21-\x7e]{1,128}")


def new_request_id() -> str:
    return uuid.uuid4().hex


def request_id_of(scope: Scope) -> str:
    return str(scope["state"]["request_id"])


def id_headers(scope: Scope) -> dict[str, str]:
    return dict.fromkeys((HEADER, ANTHROPICS_HEADER), request_id_of(scope))


class RequestIdMiddleware:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        relay_id = new_request_id()
        request_id = given if _ACCEPTABLE.fullmatch(given) else relay_id
        scope.setdefault("state", {}).update(request_id=request_id, relay_id=relay_id)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(id_headers(scope))
            await send(message)

        await self._app(scope, receive, send_with_id)
