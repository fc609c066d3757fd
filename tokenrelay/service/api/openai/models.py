"""GET /v1/models."""

from __future__ import annotations

from fastapi import APIRouter

from tokenrelay.service.api.dependencies import CatalogueDep
from tokenrelay.service.api.schemas.models import ModelCard, ModelList

router = APIRouter(tags=["models"])


@router.get("/v1/models", response_model_exclude_none=True)
async def list_models(catalogue: CatalogueDep) -> ModelList:
    """The one model this server has, and its adapters."""
    return ModelList(data=await catalogue.cards())


@router.get("/v1/models/{model_id:path}", response_model_exclude_none=True)
async def retrieve_model(model_id: str, catalogue: CatalogueDep) -> ModelCard:
    """The model or adapter called ``model_id``, which may contain slashes."""
    return await catalogue.card(model_id)
