"""Requests by their ids, at whichever API process: how one is doing, its stream again, its end.

An id is that of the response object, or the part behind its prefix. A completion of several prompts has one id: it is
told of, read and cancelled as a whole, by the tenant whose it is: for any other there is no such request.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Header, Query
from starlette.responses import Response

from tokenrelay.service.api.answering import answer_id, stream
from tokenrelay.service.api.anthropic.errors import AnthropicErrorBody
from tokenrelay.service.api.anthropic.message import MESSAGE_EVENTS
from tokenrelay.service.api.dependencies import Api, TenantDep
from tokenrelay.service.api.lifecycle.choices import Choices
from tokenrelay.service.api.lifecycle.cursor import Cursor
from tokenrelay.service.api.ollama.answer import OllamaChatAnswer, OllamaGenerateAnswer
from tokenrelay.service.api.ollama.errors import OllamaErrorBody
from tokenrelay.service.api.openapi.operation import Responses, events, header, lines
from tokenrelay.service.api.operations.request_status import status_of
from tokenrelay.service.api.process import ApiProcess
from tokenrelay.service.api.responses.events import RESPONSE_EVENTS
from tokenrelay.service.api.schemas.chat import ChatCompletionChunk
from tokenrelay.service.api.schemas.completions import Completion
from tokenrelay.service.api.schemas.embeddings import EmbeddingList
from tokenrelay.service.api.schemas.errors import ErrorBody
from tokenrelay.service.api.schemas.requests import Cancellation, RequestStatus
from tokenrelay.service.api.streaming.sse import END
from tokenrelay.service.errors import InvalidRequestError, NotFoundError
from tokenrelay.service.queue import CancelOutcome

ERROR_BODIES = (ErrorBody, AnthropicErrorBody)
STREAM: Responses = {
    200: {
        "description": "The chunks behind the cursor, as the request's route writes them; with ids, where it can.",
        "headers": {"X-Response-Id": header("The id of the answer.")},
        "content": {
            **events(ChatCompletionChunk, Completion, EmbeddingList, *MESSAGE_EVENTS, *RESPONSE_EVENTS, *ERROR_BODIES),
            **lines(OllamaChatAnswer, OllamaGenerateAnswer, OllamaErrorBody),
        },
    },
    204: {"description": "There is nothing behind [DONE]; a browser does not connect again."},
}
router = APIRouter(prefix="/v1/requests", tags=["requests"])

_RELAY_ID = re.compile(r"(?:[a-z]+[-_])?([0-9a-f]{32})")


@router.get("/{id}", response_model_exclude_unset=True)
async def get_request(id: str, api: Api, tenant: TenantDep) -> RequestStatus:
    """The request's state, how far it is, and what happened to it when. Until its output is forgotten."""
    answer, request_ids = await api.records.whole(_relay_id(id), tenant.name)
    records = [await api.records.read(request_id) for request_id in request_ids]
    logs = [await api.token_log.read(request_id) for request_id in request_ids]
    return status_of(answer_id(answer, _relay_id(id)), records, logs)


@router.get("/{id}/stream", response_class=Response, responses=STREAM)
async def resume_stream(
    id: str,
    api: Api,
    tenant: TenantDep,
    starting_after: Annotated[str, Query(description="The id of the last chunk you have; 0: everything.")] = "0",
    last_event_id: Annotated[str | None, Header(description="The same; a browser sends it by itself.")] = None,
) -> Response:
    """Read on behind any chunk of the request's stream: what is there, then what comes, as it would have come."""
    param, after = ("Last-Event-ID", last_event_id) if last_event_id else ("starting_after", starting_after)
    answer, request_ids = await api.records.whole(_relay_id(id), tenant.name)
    if answer.num_generated > answer.n:
        raise InvalidRequestError("A request with best_of above n has no stream; send it again.")
    if after == END:
        return Response(status_code=204)  # which tells an EventSource not to connect again
    cursor = Cursor.parse(after, len(request_ids), param)
    return stream(api, await Choices.resume(api.generations, request_ids, cursor), resumed=True)


@router.post("/{id}/cancel")
@router.delete("/{id}", name="delete_request")
async def cancel_request(id: str, api: Api, tenant: TenantDep) -> Cancellation:
    """End the request, wherever it is. Its readers get an error of the code ``cancelled``."""
    answer, request_ids = await api.records.whole(_relay_id(id), tenant.name)
    return Cancellation(id=answer_id(answer, _relay_id(id)), was=await _cancel(api, request_ids))


async def _cancel(api: ApiProcess, request_ids: Sequence[str]) -> CancelOutcome:
    """What the part of it was that had not ended yet."""
    outcomes = [await api.queue.cancel(request_id) for request_id in request_ids]
    for outcome in (CancelOutcome.RUNNING, CancelOutcome.WAITING, CancelOutcome.FINISHED):
        if outcome in outcomes:
            return outcome
    raise _unknown()


def _relay_id(id: str) -> str:
    match = _RELAY_ID.fullmatch(id)
    if not match:
        raise _unknown()
    return match[1]


def _unknown() -> NotFoundError:
    return NotFoundError("There is no request of this id, or its output is no longer kept.")
