"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from tokenrelay.service.api.answering import answer
from tokenrelay.service.api.body import json_body
from tokenrelay.service.api.choices import Finished, Step
from tokenrelay.service.api.dependencies import AdmissionDep, RelayId
from tokenrelay.service.api.openapi import documented
from tokenrelay.service.api.schemas.chat import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChunkChoice,
    Delta,
)

router = APIRouter(tags=["generation"])


@router.post("/v1/chat/completions", **documented(ChatCompletionRequest, ChatCompletion))
async def create_chat_completion(
    request: Request,
    body: Annotated[ChatCompletionRequest, Depends(json_body(ChatCompletionRequest))],
    admission: AdmissionDep,
    relay_id: RelayId,
) -> Response:
    """Continue a conversation. With ``stream=true``, the answer comes as server-sent events while it is generated."""
    submissions = await admission.chat(body, relay_id)
    return await answer(request, body, submissions, ChatFormat(body, relay_id))


class ChatFormat:
    """Chunks and answers of one chat completion."""

    def __init__(self, body: ChatCompletionRequest, relay_id: str) -> None:
        self._id = f"chatcmpl-{relay_id}"
        self._created = int(time.time())
        self._model = body.model
        self._n = body.n or 1
        self._include_usage = body.include_usage

    def opening(self) -> list[ChatCompletionChunk]:
        return [self._chunk(i, Delta(role="assistant", content="")) for i in range(self._n)]

    def chunks(self, step: Step) -> list[ChatCompletionChunk]:
        chunks = []
        if step.text:
            chunks.append(self._chunk(step.choice, Delta(content=step.text)))
        if step.finish_reason:
            chunks.append(self._chunk(step.choice, Delta(), step.finish_reason))
        if step.usage and self._include_usage:
            chunks.append(self._around([], usage=step.usage))
        return chunks

    def answer(self, finished: Finished) -> ChatCompletion:
        choices = [
            ChatChoice(index=c.index, message=AnswerMessage(content=c.text), finish_reason=c.finish_reason)
            for c in finished.choices
        ]
        return ChatCompletion(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=finished.usage
        )

    def _chunk(self, choice: int, delta: Delta, finish_reason: str | None = None) -> ChatCompletionChunk:
        usage = {"usage": None} if self._include_usage else {}
        chunk_choice = ChunkChoice(index=choice, delta=delta, logprobs=None, finish_reason=finish_reason)
        return self._around([chunk_choice], **usage)

    def _around(self, choices: list[ChunkChoice], **usage: Any) -> ChatCompletionChunk:
        """Every field is set here: only set fields are sent."""
        return ChatCompletionChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=choices,
            **usage,
        )
