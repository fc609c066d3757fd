"""The short way to write a chunk gives what its schema gives, whatever the text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.sse import format_sse_event
from hypothesis import given
from hypothesis import strategies as st

from tokenrelay.service.api.schemas.chat import ChatCompletionChunk, ChunkChoice, MessageDelta
from tokenrelay.service.api.schemas.completions import Completion, CompletionChoice
from tokenrelay.service.api.streaming.sse import ServerSentEvents
from tokenrelay.service.api.streaming.text_chunks import TextChunks

TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(['"', "\\", "\0", "\n\n", "\u2028", "é😀"])
ABOUT: dict[str, Any] = {"id": 'chatcmpl-"\\', "created": 1, "model": "a/b\0"}


def chat_chunk(choice: int, text: str) -> ChatCompletionChunk:
    delta = ChunkChoice(index=choice, delta=MessageDelta(content=text), logprobs=None, finish_reason=None)
    return ChatCompletionChunk(**ABOUT, choices=[delta], usage=None)


def completion_chunk(choice: int, text: str) -> Completion:
    return Completion(**ABOUT, choices=[CompletionChoice(index=choice, text=text, finish_reason=None)])


@pytest.mark.parametrize("chunk_of", [chat_chunk, completion_chunk])
@given(texts=st.lists(st.tuples(st.integers(0, 3), TEXTS), min_size=1, max_size=5))
def test_the_bytes_are_those_of_the_schema(chunk_of: Any, texts: list[tuple[int, str]]) -> None:
    chunks, events = TextChunks(chunk_of), ServerSentEvents()
    for choice, text in texts:
        written, schemas = chunks.json(choice, text), chunk_of(choice, text).model_dump_json(exclude_unset=True)
        assert written.decode() == schemas
        assert events.frame(written, "7.1") == format_sse_event(data_str=schemas, id="7.1")
        assert json.loads(written)["choices"][0]["index"] == choice
