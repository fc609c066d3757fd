"""What both generation routes do with their submissions: run them, and answer as a stream or as one object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response

from tokenrelay.service.api.choices import LARGE_LOGPROBS, Choices, Finished
from tokenrelay.service.api.event_loop import client_gone, off_loop_if_large, race
from tokenrelay.service.api.process import ApiProcess
from tokenrelay.service.api.schemas.request import GenerationRequest
from tokenrelay.service.api.sse import ChunkFormat, EventStream
from tokenrelay.service.messages import Submission


class AnswerFormat(ChunkFormat, Protocol):
    def answer(self, finished: Finished) -> BaseModel: ...


async def answer(
    request: Request, body: GenerationRequest, submissions: Sequence[Submission], answer_format: AnswerFormat
) -> Response:
    """Queue, then answer: a refusal is a proper HTTP status, since no response has begun."""
    api: ApiProcess = request.app.state.api
    choices = await Choices.start(api.generations, submissions)
    sinks = {"X-Attention-Sinks": str(api.settings.attention_sinks)} if api.settings.attention_sinks else {}
    if body.stream:
        return EventStream(choices, answer_format, api.generations, api.settings.keep_alive_seconds, sinks)
    try:
        finished = await race(
            choices.finished(body.n or 1), client_gone(request.receive), api.generations.interruption()
        )
    finally:
        await choices.close()
    size = sum(output.num_entries for output in finished.outputs)
    content = await off_loop_if_large(size, LARGE_LOGPROBS, lambda: _json(answer_format.answer(finished)))
    return Response(content, media_type="application/json", headers=sinks)


def _json(answered: BaseModel) -> str:
    """Only the fields that were set: what was not asked for is not mentioned."""
    return answered.model_dump_json(exclude_unset=True)
