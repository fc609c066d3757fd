"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from tokenrelay.service.api.admission.answer_specs import Wording
from tokenrelay.service.api.admission.room import require_room
from tokenrelay.service.api.answering import answer
from tokenrelay.service.api.dependencies import AdmissionDep, RelayId
from tokenrelay.service.api.http.body import json_body
from tokenrelay.service.api.openapi.operation import documented
from tokenrelay.service.api.schemas.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionRequest

router = APIRouter(tags=["generation"])


@router.post("/v1/chat/completions", **documented(ChatCompletionRequest, ChatCompletion, chunks=[ChatCompletionChunk]))
async def create_chat_completion(
    request: Request,
    body: Annotated[ChatCompletionRequest, Depends(json_body(ChatCompletionRequest))],
    admission: AdmissionDep,
    relay_id: RelayId,
) -> Response:
    """Continue a conversation. With ``stream=true``, the answer comes as server-sent events while it is generated."""
    await require_room(request)
    return await answer(request, body, await admission.chat(body, relay_id), Wording("chat"))
