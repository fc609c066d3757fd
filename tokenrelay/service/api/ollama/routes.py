"""POST /api/chat and /api/generate."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from tokenrelay.service.api.admission.answer_specs import Body, Wording
from tokenrelay.service.api.admission.room import require_room
from tokenrelay.service.api.answering import answer
from tokenrelay.service.api.catalogue import Catalogue
from tokenrelay.service.api.dependencies import AdmissionDep, CatalogueDep, Model, RelayId
from tokenrelay.service.api.http.body import json_body
from tokenrelay.service.api.http.rewording import told_in
from tokenrelay.service.api.ollama.answer import OllamaChatAnswer, OllamaGenerateAnswer, OllamaMessage
from tokenrelay.service.api.ollama.errors import OllamaErrorBody
from tokenrelay.service.api.ollama.ollama_format import timestamp
from tokenrelay.service.api.ollama.request import OllamaChatRequest, OllamaGenerateRequest
from tokenrelay.service.api.ollama.translation import WORDS, chat_of, generation_of, named, raw_of
from tokenrelay.service.api.openapi.operation import documented, lines
from tokenrelay.service.api.served_model import ServedModel
from tokenrelay.service.errors import InvalidRequestError
from tokenrelay.service.messages import Submission
from tokenrelay.service.terms import Route

router = APIRouter(tags=["ollama"])


@router.post(
    "/api/chat",
    **documented(OllamaChatRequest, OllamaChatAnswer, OllamaErrorBody, chunks=[OllamaChatAnswer], stream=lines),
)
async def chat(
    request: Request,
    body: Annotated[OllamaChatRequest, Depends(json_body(OllamaChatRequest))],
    admission: AdmissionDep,
    model: Model,
    catalogue: CatalogueDep,
    relay_id: RelayId,
) -> Response:
    """Continue a conversation. Unless ``stream=false``, the answer comes in lines of JSON while it is generated."""
    await _require_loaded(body, model, catalogue)
    if not body.messages:
        return _loaded(OllamaChatAnswer, body.model, message=OllamaMessage(role="assistant", content=""))
    await require_room(request)
    with told_in(WORDS):
        given = chat_of(body, model.name, model.dialect)
        submissions = await admission.chat(given, relay_id, fit=True)
    return await _answer(request, given, submissions, "ollama_chat", body.model)


@router.post(
    "/api/generate",
    **documented(
        OllamaGenerateRequest, OllamaGenerateAnswer, OllamaErrorBody, chunks=[OllamaGenerateAnswer], stream=lines
    ),
)
async def generate(
    request: Request,
    body: Annotated[OllamaGenerateRequest, Depends(json_body(OllamaGenerateRequest))],
    admission: AdmissionDep,
    model: Model,
    catalogue: CatalogueDep,
    relay_id: RelayId,
) -> Response:
    """Answer a prompt, or continue it with ``raw=true``. Unless ``stream=false``, in lines of JSON."""
    await _require_loaded(body, model, catalogue)
    if body.raw and (body.system or body.think is not None):
        raise InvalidRequestError("'raw' goes without system and think: the prompt is all that is read.", param="raw")
    if not body.prompt:
        return _loaded(OllamaGenerateAnswer, body.model, response="")
    await require_room(request)
    with told_in(WORDS):
        if body.raw:
            raw = raw_of(body, model.name, most=model.context)
            submissions = await admission.completion(raw, relay_id, fit=True)
            return await _answer(request, raw, submissions, "ollama_generate", body.model)
        given = generation_of(body, model.name, model.dialect)
        submissions = await admission.chat(given, relay_id, fit=True)
    return await _answer(request, given, submissions, "ollama_generate", body.model)


async def _require_loaded(
    body: OllamaChatRequest | OllamaGenerateRequest, model: ServedModel, catalogue: Catalogue
) -> None:
    """Raises NotFoundError, or InvalidRequestError: nothing is loaded or unloaded by clients."""
    await catalogue.adapter(named(body.model, model.name))
    if body.options and (body.options.num_ctx or 0) > model.context:
        raise InvalidRequestError(
            f"'options.num_ctx': this model's context holds {model.context} tokens; leave it out, or ask for less.",
            param="options.num_ctx",
        )


def _loaded(kind: type[BaseModel], name: str, **fields: Any) -> Response:
    """To who asked for nothing."""
    told = kind(model=name, created_at=timestamp(int(time.time())), done=True, done_reason="load", **fields)
    return JSONResponse(told.model_dump(exclude_unset=True))


async def _answer(request: Request, body: Body, submissions: list[Submission], route: Route, name: str) -> Response:
    return await answer(request, body, submissions, Wording(route, {"model": name}))
