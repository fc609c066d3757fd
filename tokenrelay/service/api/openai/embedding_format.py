"""Embeddings as OpenAI writes them: a function of what the broker keeps, in whichever process."""

from __future__ import annotations

import math
import struct
from base64 import b64encode
from collections.abc import Sequence
from typing import Any

from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.service.api.lifecycle.choices import Finished, Output, Step
from tokenrelay.service.api.schemas.embeddings import Embedding, EmbeddingList, EmbeddingUsage
from tokenrelay.service.api.schemas.usage import CompletionUsage
from tokenrelay.service.api.streaming.sse import ServerSentEvents
from tokenrelay.service.errors import ServiceError
from tokenrelay.service.terms import AnswerSpec


class EmbeddingFormat(ServerSentEvents):
    """One spec per input. As a stream, by the request's id, each embedding comes when it is there."""

    def __init__(self, specs: Sequence[AnswerSpec], tokenizer: Tokenizer, answer_id: str) -> None:
        self._model = specs[0].model
        self._dimensions: int | None = specs[0].extra.get("dimensions")
        self._in_base64: bool = specs[0].extra.get("encoding_format") == "base64"

    def opening(self, first: Step) -> list[EmbeddingList]:
        return []

    def chunks(self, step: Step) -> list[EmbeddingList]:
        return [self._list([step.output], step.usage)]

    def pass_over(self, step: Step) -> None:
        """Each embedding stands alone."""

    def interim(self, name: str | None, **fields: Any) -> bytes:
        raise NotImplementedError("nobody can ask for it")

    def answer(self, finished: Finished) -> EmbeddingList:
        return self._list(finished.outputs, finished.usage)

    def _list(self, outputs: Sequence[Output], usage: CompletionUsage | None) -> EmbeddingList:
        """Every field is set here: only set fields are sent."""
        data = [Embedding(object="embedding", index=o.choice, embedding=self._embedding(o)) for o in outputs]
        if usage is None:
            return EmbeddingList(object="list", data=data, model=self._model)
        told = EmbeddingUsage(prompt_tokens=usage.prompt_tokens, total_tokens=usage.prompt_tokens)
        return EmbeddingList(object="list", data=data, model=self._model, usage=told)

    def _embedding(self, output: Output) -> list[float] | str:
        if not output.embedding:
            raise ServiceError("A worker of an older version, without embeddings, took the request; send it again.")
        embedding = output.embedding if self._dimensions is None else shortened(output.embedding, self._dimensions)
        return b64encode(embedding).decode() if self._in_base64 else list(_numbers(embedding))


def shortened(embedding: bytes, dimensions: int) -> bytes:
    """Its first numbers, at the length 1 again. (as with OpenAI's: what Matryoshka training is for)"""
    first = _numbers(embedding[: 4 * dimensions])
    length = math.sqrt(math.fsum(number * number for number in first)) or 1.0
    return struct.pack(f"<{len(first)}f", *(number / length for number in first))


def _numbers(embedding: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(embedding) // 4}f", embedding)
