"""Looks on as an application answers, and holds every answer against the vendor's document."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.service.published.documents import Document, document

NO_VENDORS = ("/livez", "/readyz", "/health", "/version", "/metrics", "/docs", "/openapi.json", "/api/")
ERROR = "ErrorResponse"
PING = {"type": "ping"}  # Anthropic's; its document leaves it to the prose
EVENTS = {  # of streams that the documents do not list
    "/completions": ["CreateCompletionResponse"],
    "/messages": ["MessageStreamEvent"],
    "/responses/": ["ResponseStreamEvent"],
    "/requests/": [  # our own, of any route's requests
        *("CreateChatCompletionStreamResponse", "CreateCompletionResponse"),
        *("ResponseStreamEvent", "CreateEmbeddingResponse"),
    ],
}


@dataclass
class Answer:
    """One response, as far as it got."""

    method: str
    path: str
    status: int = 0
    media_type: str = ""
    body: bytearray = field(default_factory=bytearray)
    is_whole: bool = False

    def complaints(self) -> list[str]:
        """What the document forbids of it."""
        return [f"{self.method} {self.path} {self.status}: {complaint}" for complaint in self._complaints()]

    def _complaints(self) -> Iterator[str]:
        if self.method == "OPTIONS" or self.path.startswith(NO_VENDORS):
            return
        if self.media_type == "text/event-stream":
            for value in events_of(bytes(self.body)):
                yield from self._complaints_of(value, [*self._events, ERROR])
        elif self.is_whole and self.status >= 400 and self.body:  # without one it reaches nobody
            yield from self._complaints_of(json.loads(self.body), [ERROR])
        elif self.is_whole and self.media_type == "application/json":
            listed = self._schemas.get(self.media_type)
            yield from self._complaints_of(json.loads(self.body), [listed] if listed else [])

    def _complaints_of(self, value: Any, alternatives: Iterable[str]) -> Iterator[str]:
        complaints = [self._document.complaint(name, value) for name in alternatives]
        if complaints and self.path.removeprefix("/v1").startswith(
            "/requests/"
        ):  # a stream of Anthropic's may be read on there, too
            complaints += [document("anthropic").complaint(name, value) for name in ("MessageStreamEvent", ERROR)]
        if complaints and all(complaints) and value != PING:
            yield f"{complaints[0]}, in {str(value)[:500]}"

    @property
    def _events(self) -> list[str]:
        route = self.path.removeprefix("/v1")
        listed = self._schemas.get("text/event-stream")
        return [listed] if listed else next((EVENTS[prefix] for prefix in EVENTS if route.startswith(prefix)), [])

    @property
    def _schemas(self) -> dict[str, str]:
        return self._document.schemas_of(self.method, self.path.removeprefix("/v1"))

    @property
    def _document(self) -> Document:
        return document("anthropic" if self.path.removeprefix("/v1").startswith("/messages") else "openai")


class Judge:
    """An application around another, which remembers its answers. They are judged when there is time."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._answers: list[Answer] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = Answer(scope["method"], scope["path"])
        self._answers.append(answer)

        async def overhear(message: Message) -> None:
            _note(answer, message)
            await send(message)

        await self._app(scope, receive, overhear)

    def complaints(self) -> list[str]:
        """About the answers since the last call."""
        answers, self._answers = self._answers, []
        return [complaint for answer in answers for complaint in answer.complaints()]


def _note(answer: Answer, message: Message) -> None:
    if message["type"] == "http.response.start":
        answer.status = message["status"]
        answer.media_type = Headers(raw=message["headers"]).get("content-type", "").partition(";")[0]
    elif message["type"] == "http.response.body":
        answer.body += message.get("body", b"")
        answer.is_whole = not message.get("more_body", False)


def events_of(body: bytes) -> Iterator[Any]:
    """The JSON of every whole server-sent event."""
    for block in body.split(b"\n\n")[:-1]:
        data = b"\n".join(line[5:].strip() for line in block.splitlines() if line.startswith(b"data:"))
        if data and data != b"[DONE]":
            yield json.loads(data)
