"""What orchestrators and operators ask: alive, ready, which version, which figures."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from tokenrelay import __version__
from tokenrelay.service.api.dependencies import Api, ReadinessDep
from tokenrelay.service.api.openapi.document import OPERATIONS
from tokenrelay.service.api.openapi.operation import Responses
from tokenrelay.service.api.schemas.health import Ready, Unready, Version

router = APIRouter(tags=[OPERATIONS])

READINESS: Responses = {200: {"model": Ready}, 503: {"model": Unready, "description": "Not now, and why."}}
_TEXT = {CONTENT_TYPE_LATEST.partition(";")[0]: {"schema": {"type": "string"}}}
FIGURES: Responses = {200: {"description": "The figures.", "content": _TEXT}}


@router.get("/livez")
async def livez() -> Ready:
    """This process answers. Says nothing about workers: restarting the API would not bring them back."""
    return Ready()


@router.get("/readyz", responses=READINESS)
@router.get("/health", responses=READINESS, name="health")
async def readyz(readiness: ReadinessDep) -> Response:
    """200 if a request sent now would be worked on; else 503 and the reason."""
    reason = await readiness.observe()
    if reason:
        return JSONResponse(Unready(reason=reason).model_dump(), 503)
    return JSONResponse(Ready().model_dump())


@router.get("/version")
async def version() -> Version:
    """Of this server."""
    return Version(version=__version__)


@router.get("/metrics", responses=FIGURES, response_class=Response)
async def metrics(api: Api) -> Response:
    """Prometheus' text format, over all API processes of this machine."""
    return Response(api.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
