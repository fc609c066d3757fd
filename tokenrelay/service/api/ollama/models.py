"""GET /api/tags, /api/ps and /api/version, POST /api/show: the model and its adapters, in Ollama's words."""

from __future__ import annotations

import hashlib
from typing import Annotated

from fastapi import APIRouter, Depends

from tokenrelay.service.api.dependencies import Api, CatalogueDep, Model
from tokenrelay.service.api.http.body import json_body
from tokenrelay.service.api.ollama.answer import (
    OllamaDetails,
    OllamaModel,
    OllamaModels,
    OllamaVersion,
    RunningOllamaModel,
    RunningOllamaModels,
    ShownModel,
)
from tokenrelay.service.api.ollama.errors import OllamaErrorBody
from tokenrelay.service.api.ollama.ollama_format import timestamp
from tokenrelay.service.api.ollama.request import ShowRequest
from tokenrelay.service.api.ollama.translation import LATEST, named
from tokenrelay.service.api.openapi.operation import documented
from tokenrelay.service.api.schemas.models import ModelCard
from tokenrelay.service.api.served_model import ServedModel

SPOKEN = "0.12.0"  # of Ollama's API: front-ends ask for the least they need
NEVER = "9999-12-31T23:59:59Z"

router = APIRouter(tags=["ollama"])


@router.get("/api/version")
async def ollama_version() -> OllamaVersion:
    """The version of Ollama's API that is spoken here; this server's own is at /version."""
    return OllamaVersion(version=SPOKEN)


@router.get("/api/tags")
async def list_tags(model: Model, catalogue: CatalogueDep) -> OllamaModels:
    """The one model there is, and its adapters."""
    return OllamaModels(models=[_listed(card, model) for card in await catalogue.cards()])


@router.get("/api/ps")
async def list_running(model: Model, api: Api) -> RunningOllamaModels:
    """The same: it stays loaded."""
    name, size = _tagged(model.name), model.description.size
    running = RunningOllamaModel(
        name=name,
        model=name,
        size=size,
        digest=_digest(model, model.name),
        details=_details(model),
        expires_at=NEVER,
        size_vram=size if api.settings.device == "cuda" else 0,
        context_length=model.context,
    )
    return RunningOllamaModels(models=[running])


@router.post("/api/show", **documented(ShowRequest, ShownModel, OllamaErrorBody))
async def show(
    body: Annotated[ShowRequest, Depends(json_body(ShowRequest))], model: Model, catalogue: CatalogueDep
) -> ShownModel:
    """What it is, and how it is talked to."""
    await catalogue.adapter(named(body.model, model.name))
    family = model.description.family
    return ShownModel(
        modelfile="",
        parameters="",
        template=model.tokenizer.chat_template.source or "",
        details=_details(model),
        model_info={
            "general.architecture": family,
            "general.parameter_count": model.description.num_parameters,
            f"{family}.context_length": model.context,
        },
        capabilities=_capabilities(model),
        modified_at=timestamp(model.description.modified_at),
    )


def _listed(card: ModelCard, model: ServedModel) -> OllamaModel:
    """An adapter is as large as its model: that is what it runs in."""
    name = _tagged(card.id)
    return OllamaModel(
        name=name,
        model=name,
        modified_at=timestamp(card.created if card.parent else model.description.modified_at),
        size=model.description.size,
        digest=_digest(model, card.id),
        details=_details(model, card.parent),
    )


def _tagged(name: str) -> str:
    return name if ":" in name else name + LATEST


def _digest(model: ServedModel, name: str) -> str:
    described = model.description
    return hashlib.sha256(f"{name}\n{described.size}\n{described.modified_at}".encode()).hexdigest()


def _details(model: ServedModel, parent: str | None = None) -> OllamaDetails:
    described = model.description
    return OllamaDetails(
        parent_model=parent or "",
        format=described.file_format,
        family=described.family,
        families=[described.family],
        parameter_size=_in_words(described.num_parameters),
        quantization_level=described.weight_type,
    )


def _in_words(count: int) -> str:
    """134515008 → 134.5M"""
    for unit, letter in ((10**9, "B"), (10**6, "M")):
        if count >= unit:
            return f"{count / unit:.1f}{letter}"
    return str(count)


def _capabilities(model: ServedModel) -> list[str]:
    if not model.tokenizer.chat_template.source:
        return ["completion"]
    return ["completion", "tools", *(["thinking"] if model.dialect.reasoning_format else [])]
