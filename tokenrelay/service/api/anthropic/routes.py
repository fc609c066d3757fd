"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from tokenrelay.service.api.admission.answer_specs import Wording
from tokenrelay.service.api.admission.room import require_room
from tokenrelay.service.api.answering import answer
from tokenrelay.service.api.anthropic.errors import AnthropicErrorBody
from tokenrelay.service.api.anthropic.message import MESSAGE_EVENTS, AnthropicMessage, InputTokens
from tokenrelay.service.api.anthropic.request import CountTokensRequest, MessagesRequest
from tokenrelay.service.api.anthropic.translation import WORDS, as_chat, as_prompt
from tokenrelay.service.api.dependencies import AdmissionDep, Model, RelayId
from tokenrelay.service.api.http.body import json_body
from tokenrelay.service.api.http.rewording import told_in
from tokenrelay.service.api.openapi.operation import documented

router = APIRouter(tags=["anthropic"])


@router.post("/v1/messages", **documented(MessagesRequest, AnthropicMessage, AnthropicErrorBody, chunks=MESSAGE_EVENTS))
async def create_message(
    request: Request,
    body: Annotated[MessagesRequest, Depends(json_body(MessagesRequest))],
    admission: AdmissionDep,
    model: Model,
    relay_id: RelayId,
) -> Response:
    """Anthropic's Messages. With ``stream=true``, its events come as server-sent events while they are generated."""
    await require_room(request)
    with told_in(WORDS):
        chat = as_chat(body, model.dialect)
        submissions = await admission.chat(chat, relay_id, fit=True)
    return await answer(request, chat, submissions, Wording("messages", {"max_tokens": body.max_tokens}))


@router.post("/v1/messages/count_tokens", **documented(CountTokensRequest, InputTokens, AnthropicErrorBody))
async def count_tokens(
    body: Annotated[CountTokensRequest, Depends(json_body(CountTokensRequest))], admission: AdmissionDep, model: Model
) -> InputTokens:
    """How many tokens the model would read."""
    with told_in(WORDS):
        return InputTokens(input_tokens=await admission.count_tokens(as_prompt(body, model.dialect)))
