"""POST /v1/completions."""

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
from tokenrelay.service.api.schemas.completions import Completion, CompletionRequest

router = APIRouter(tags=["generation"])


@router.post("/v1/completions", **documented(CompletionRequest, Completion, chunks=[Completion]))
async def create_completion(
    request: Request,
    body: Annotated[CompletionRequest, Depends(json_body(CompletionRequest))],
    admission: AdmissionDep,
    relay_id: RelayId,
) -> Response:
    """Continue one or more texts, or token ids. The choices of prompt p are numbered from p·n."""
    await require_room(request)
    return await answer(request, body, await admission.completion(body, relay_id), Wording("completion"))
