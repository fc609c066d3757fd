"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as in vLLM: for an operator, where a setting allows it."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.responses import JSONResponse, Response

from tokenrelay.model.weights.lora_config import LoRAError
from tokenrelay.service.adapters import describe_adapter
from tokenrelay.service.api.dependencies import Api
from tokenrelay.service.api.http.body import json_body
from tokenrelay.service.api.openapi.document import OPERATIONS
from tokenrelay.service.api.openapi.operation import documented
from tokenrelay.service.api.process import ApiProcess
from tokenrelay.service.api.schemas.adapters import LoadAdapterRequest, UnloadAdapterRequest, UnloadedAdapter
from tokenrelay.service.api.schemas.models import ModelCard
from tokenrelay.service.errors import Forbidden, InvalidRequestError, NotFoundError

router = APIRouter(prefix="/v1", tags=[OPERATIONS])


@router.post("/load_lora_adapter", **documented(LoadAdapterRequest, ModelCard, queued=False))
async def load_adapter(
    body: Annotated[LoadAdapterRequest, Depends(json_body(LoadAdapterRequest))], api: Api
) -> Response:
    """Serve a LoRA adapter from now on, under a name of its own. Its files are checked; workers load it when needed."""
    _require_allowed(api)
    if body.lora_name == api.model.name:
        raise InvalidRequestError(f"'{body.lora_name}' is the model itself; choose another name.", param="lora_name")
    try:
        adapter = await asyncio.to_thread(
            describe_adapter, body.lora_name, body.lora_path, api.model.network, api.settings.max_lora_rank
        )
    except LoRAError as error:
        raise InvalidRequestError(f"{str(error)[:1000]}.", param="lora_path", code="invalid_adapter") from error
    await api.adapters.load(adapter, replace=bool(body.load_inplace))
    return JSONResponse(api.catalogue.card_of(adapter).model_dump(exclude_none=True))


@router.post("/unload_lora_adapter", **documented(UnloadAdapterRequest, UnloadedAdapter, queued=False))
async def unload_adapter(
    body: Annotated[UnloadAdapterRequest, Depends(json_body(UnloadAdapterRequest))], api: Api
) -> Response:
    """Serve it no longer. Requests that are accepted already are answered with it."""
    _require_allowed(api)
    if not await api.adapters.unload(body.lora_name):
        raise NotFoundError(f"No adapter '{body.lora_name}' is loaded.", param="lora_name", code="model_not_found")
    return JSONResponse(UnloadedAdapter(id=body.lora_name).model_dump())


def _require_allowed(api: ApiProcess) -> None:
    if not api.settings.allow_lora_loading:
        raise Forbidden("Adapters are loaded and unloaded only where the setting allow_lora_loading says so.")
