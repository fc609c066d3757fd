"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.service.api.answering import answer
from tokenrelay.service.api.body import json_body
from tokenrelay.service.api.choices import Finished, Output, Step
from tokenrelay.service.api.dependencies import AdmissionDep, Model, RelayId
from tokenrelay.service.api.logprobs import LogprobsFormat
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
from tokenrelay.service.messages import Submission

router = APIRouter(tags=["generation"])


@router.post("/v1/chat/completions", **documented(ChatCompletionRequest, ChatCompletion))
async def create_chat_completion(
    request: Request,
    body: Annotated[ChatCompletionRequest, Depends(json_body(ChatCompletionRequest))],
    admission: AdmissionDep,
    model: Model,
    relay_id: RelayId,
) -> Response:
    """Continue a conversation. With ``stream=true``, the answer comes as server-sent events while it is generated."""
    submissions = await admission.chat(body, relay_id)
    return await answer(request, body, submissions, ChatFormat(body, submissions[0], model.tokenizer, relay_id))


class ChatFormat:
    """Chunks and answers of one chat completion."""

    def __init__(
        self, body: ChatCompletionRequest, submission: Submission, tokenizer: Tokenizer, relay_id: str
    ) -> None:
        self._id = f"chatcmpl-{relay_id}"
        self._created = int(time.time())
        self._body = body
        self._prompt_token_ids = submission.prompt_token_ids
        self._logprobs = LogprobsFormat(body, tokenizer)

    def opening(self, first: Step) -> list[ChatCompletionChunk]:
        roles = [self._delta(i, Delta(role="assistant", content="")) for i in range(self._body.n or 1)]
        return [self._chunk(roles[0], **self._about_prompt(first.output)), *map(self._chunk, roles[1:])]

    def chunks(self, step: Step) -> list[ChatCompletionChunk]:
        output, chunks = step.output, []
        told = self._told(output)
        if output.text or told:
            chunks.append(self._chunk(self._delta(output.choice, Delta(content=output.text), **told)))
        if output.finish_reason:
            chunks.append(self._chunk(self._delta(output.choice, Delta(), finish_reason=output.finish_reason)))
        if step.usage and self._body.include_usage:
            chunks.append(self._chunk(usage=step.usage))
        return chunks

    def answer(self, finished: Finished) -> ChatCompletion:
        return ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._body.model,
            choices=[self._choice(output) for output in finished.outputs],
            usage=finished.usage,
            **self._about_prompt(finished.outputs[0]),
        )

    def _choice(self, output: Output) -> ChatChoice:
        message = AnswerMessage(role="assistant", content=output.text, refusal=None)
        fields = {**self._silent(), **self._told(output), "finish_reason": output.finish_reason}
        return ChatChoice(index=output.choice, message=message, **fields)

    def _about_prompt(self, output: Output) -> dict[str, Any]:
        return self._logprobs.about_prompt(self._prompt_token_ids, output.prompt_logprobs)

    def _told(self, output: Output) -> dict[str, Any]:
        """The fields beside the text that are asked for and have something to say."""
        told: dict[str, Any] = {}
        if self._body.num_logprobs is not None and output.logprobs:
            told["logprobs"] = self._logprobs.chat(output.logprobs)
        if self._body.return_token_ids and output.token_ids:
            told["token_ids"] = list(output.token_ids)
        return told

    def _silent(self) -> dict[str, Any]:
        return {"logprobs": None} | ({"token_ids": []} if self._body.return_token_ids else {})

    def _delta(self, choice: int, delta: Delta, **fields: Any) -> ChunkChoice:
        return ChunkChoice(index=choice, delta=delta, **{**self._silent(), "finish_reason": None, **fields})

    def _chunk(self, *choices: ChunkChoice, **fields: Any) -> ChatCompletionChunk:
        """Every field is set here: only set fields are sent."""
        usage = {"usage": None} if self._body.include_usage else {}
        return ChatCompletionChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._body.model,
            choices=list(choices),
            **(usage | fields),
        )
