"""The judge knows a wrong answer from a right one, and asks no more than the documents say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.service.published.judge import Answer

CHOICE = {"index": 0, "message": {"role": "assistant", "content": "a", "refusal": None}, "logprobs": None}
CHAT = {"id": "c", "object": "chat.completion", "created": 1, "model": "m"}
CHUNK = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
DELTA = {"index": 0, "delta": {"content": "a"}, "finish_reason": None}
ERROR = {"message": "no", "type": "invalid_request_error", "param": None, "code": "nothing"}
EMBEDDING = {"object": "embedding", "index": 0}
USAGE = {"prompt_tokens": 1, "total_tokens": 1}
TEXT = {"id": "c", "object": "text_completion", "created": 1, "model": "m"}
TEXT_CHOICE = {"index": 0, "text": "a", "finish_reason": None, "logprobs": None}
ANTHROPIC_ERROR = {"type": "api_error", "message": "no"}
MESSAGE_STOP = {"type": "message_stop"}


def whole(path: str, body: Any, status: int = 200) -> Answer:
    return Answer("POST", path, status, "application/json", bytearray(json.dumps(body).encode()), is_whole=True)


def stream(path: str, *events: Any) -> Answer:
    body = b": a comment\n" + b"".join(b"id: 1\ndata: " + json.dumps(event).encode() + b"\n\n" for event in events)
    return Answer("POST", path, 200, "text/event-stream", bytearray(body + b"data: [DONE]\n\ndata: {cut"))


@pytest.mark.parametrize(
    "answer",
    [
        whole("/v1/chat/completions", CHAT | {"choices": [CHOICE | {"finish_reason": "stop"}]}),
        whole("/chat/completions", CHAT | {"choices": [], "our_extension": 1}),
        whole("/v1/chat/completions", {"error": ERROR}, 400),
        whole("/v1/embeddings", {"object": "list", "model": "m", "usage": USAGE, "data": []}),
        whole("/v1/messages", {"type": "error", "error": {"type": "api_error", "message": "no"}}, 500),
        stream("/v1/chat/completions", CHUNK | {"choices": [DELTA], "usage": None}, {"error": ERROR}),
        stream("/v1/completions", TEXT | {"choices": [TEXT_CHOICE], "usage": None}),
        stream("/v1/requests/1/stream", TEXT | {"choices": [TEXT_CHOICE]}, CHUNK | {"choices": [DELTA]}),
        stream("/v1/messages", MESSAGE_STOP, {"type": "ping"}),
        whole("/readyz", {"status": "unavailable"}, 503),
    ],
    ids=lambda answer: f"{answer.path} {answer.status}",
)
def test_a_right_answer(answer: Answer) -> None:
    assert answer.complaints() == []


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (whole("/v1/chat/completions", CHAT | {"choices": [CHOICE]}), "'finish_reason' is a required property"),
        (whole("/chat/completions", CHAT), "'choices' is a required property"),
        (whole("/v1/chat/completions", CHAT | {"choices": [], "created": "now"}), "$.created: 'now' is not of type"),
        (whole("/v1/chat/completions", {"error": "no"}, 400), "$.error: 'no' is not of type 'object'"),
        (whole("/v1/unheard-of", {"detail": "no"}, 404), "'error' is a required property"),
        (whole("/v1/models/a/b", {}, 500), "'error' is a required property"),
        (whole("/v1/embeddings", {"object": "list", "model": "m", "usage": USAGE, "data": [EMBEDDING]}), "'embedding'"),
        (whole("/v1/messages", {"error": ERROR}, 400), "required property"),
        (stream("/v1/chat/completions", CHUNK | {"choices": [DELTA | {"finish_reason": "end"}]}), "finish_reason"),
        (stream("/v1/chat/completions", CHUNK | {"choices": []}, {"error": {"message": "no"}}), "required property"),
        (stream("/v1/requests/1/stream", CHUNK | {"choices": [TEXT_CHOICE]}), "'delta' is a required property"),
        (stream("/v1/responses", {"type": "response.unheard_of"}), "ResponseStreamEvent"),
        (stream("/v1/messages", {"type": "message_start"}), "MessageStreamEvent"),
    ],
    ids=lambda value: f"{value.path} {value.status}" if isinstance(value, Answer) else value,
)
def test_a_wrong_answer(answer: Answer, what: str) -> None:
    (complaint,) = answer.complaints()
    assert what in complaint
