"""POST /v1/embeddings."""

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
from tokenrelay.service.api.schemas.embeddings import EmbeddingList, EmbeddingRequest

router = APIRouter(tags=["embeddings"])


@router.post("/v1/embeddings", **documented(EmbeddingRequest, EmbeddingList))
async def create_embeddings(
    request: Request,
    body: Annotated[EmbeddingRequest, Depends(json_body(EmbeddingRequest))],
    admission: AdmissionDep,
    relay_id: RelayId,
) -> Response:
    """Turn texts into vectors of the length 1: the model's hidden states, pooled. They do not depend on one another."""
    await require_room(request)
    submissions = await admission.embedding(body, relay_id)
    wording = Wording("embedding", {"dimensions": body.dimensions, "encoding_format": body.encoding_format})
    return await answer(request, body, submissions, wording)
