"""GET /v1/models."""

from __future__ import annotations

from fastapi import APIRouter

from tokenrelay.service.api.dependencies import Model
from tokenrelay.service.api.schemas.models import ModelCard, ModelList

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def list_models(model: Model) -> ModelList:
    """The one model this server has."""
    return ModelList(data=[model.card])


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(model_id: str, model: Model) -> ModelCard:
    """The model called ``model_id``, which may contain slashes."""
    model.require(model_id)
    return model.card
