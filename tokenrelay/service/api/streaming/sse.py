"""Server-sent events: the bytes of a stream, for formats to inherit, which make the chunks."""

from __future__ import annotations

from typing import Any

from fastapi.sse import format_sse_event
from pydantic import BaseModel

from tokenrelay.service.api.schemas.errors import ErrorBody
from tokenrelay.service.errors import ServiceError

KEEP_ALIVE = b": keep-alive\n"  # no blank line: openai's client takes that for an event once it has seen an id
RETRY = b"retry: 1000\n"  # milliseconds until an EventSource connects again; no blank line, for the same reason
END = "done"  # the id of a resumed stream's [DONE]: whoever comes back with it has everything


class ServerSentEvents:
    """As OpenAI's completions write them: data without a name, and ``[DONE]``."""

    media_type = "text/event-stream"
    preamble = RETRY
    keep_alive = KEEP_ALIVE
    done = format_sse_event(data_str="[DONE]")
    resumed_done = format_sse_event(data_str="[DONE]", id=END)

    def frame(self, chunk: BaseModel | bytes, at: str) -> bytes:
        """Of a chunk, or of its JSON."""
        if isinstance(chunk, bytes):
            return b"data: %b\nid: %b\n\n" % (chunk, at.encode())
        return format_sse_event(data_str=chunk.model_dump_json(exclude_unset=True), id=at)

    def unplaced(self, chunk: BaseModel, name: str | None = None) -> bytes:
        """A chunk that is not part of the log: nobody resumes behind it."""
        return format_sse_event(event=name, data_str=chunk.model_dump_json(exclude_unset=True))

    def failure(self, error: ServiceError) -> bytes:
        return self.unplaced(ErrorBody.model_validate(error.body()))


class NamedEvents(ServerSentEvents):
    """As newer protocols write them: each event's ``type`` is its name, too, and the last one says that it is."""

    done = resumed_done = b""

    def frame(self, chunk: Any, at: str) -> bytes:
        return format_sse_event(event=chunk.type, data_str=chunk.model_dump_json(exclude_unset=True), id=at)
