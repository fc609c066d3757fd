"""POST /v1/completions."""

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
from tokenrelay.service.api.schemas.completions import Completion, CompletionChoice, CompletionRequest

router = APIRouter(tags=["generation"])


@router.post("/v1/completions", **documented(CompletionRequest, Completion))
async def create_completion(
    request: Request,
    body: Annotated[CompletionRequest, Depends(json_body(CompletionRequest))],
    admission: AdmissionDep,
    relay_id: RelayId,
) -> Response:
    """Continue one or more texts, or token ids. The choices of prompt p are numbered from p·n."""
    submissions = await admission.completion(body, relay_id)
    return await answer(request, body, submissions, CompletionFormat(body, relay_id))


class CompletionFormat:
    """Chunks and answers of one completion."""

    def __init__(self, body: CompletionRequest, relay_id: str) -> None:
        self._id = f"cmpl-{relay_id}"
        self._created = int(time.time())
        self._model = body.model
        self._include_usage = body.include_usage

    def opening(self) -> list[Completion]:
        return []

    def chunks(self, step: Step) -> list[Completion]:
        chunks = []
        if step.text:
            chunks.append(self._chunk(step.choice, step.text))
        if step.finish_reason:
            chunks.append(self._chunk(step.choice, "", step.finish_reason))
        if step.usage and self._include_usage:
            chunks.append(self._around([], usage=step.usage))
        return chunks

    def answer(self, finished: Finished) -> Completion:
        return self._around([_choice(c.index, c.text, c.finish_reason) for c in finished.choices], usage=finished.usage)

    def _chunk(self, choice: int, text: str, finish_reason: str | None = None) -> Completion:
        usage = {"usage": None} if self._include_usage else {}
        return self._around([_choice(choice, text, finish_reason)], **usage)

    def _around(self, choices: list[CompletionChoice], **usage: Any) -> Completion:
        """Every field is set here: only set fields are sent."""
        return Completion(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._model,
            choices=choices,
            **usage,
        )


def _choice(index: int, text: str, finish_reason: str | None) -> CompletionChoice:
    return CompletionChoice(index=index, text=text, logprobs=None, finish_reason=finish_reason)
