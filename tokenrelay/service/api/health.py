"""What orchestrators and operators ask: alive, ready, which version, which figures."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from tokenrelay import __version__
from tokenrelay.service.api.dependencies import Api, ReadinessDep

router = APIRouter(tags=["operations"])


@router.get("/livez")
async def livez() -> dict[str, str]:
    """This process answers. Says nothing about workers: restarting the API would not bring them back."""
    return {"status": "ok"}


@router.get("/readyz")
@router.get("/health")
async def readyz(readiness: ReadinessDep) -> Response:
    """200 if a request sent now would be worked on; else 503 and the reason."""
    reason = await readiness.observe()
    if reason:
        return JSONResponse({"status": "unavailable", "reason": reason}, 503)
    return JSONResponse({"status": "ok"})


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": __version__}


@router.get("/metrics")
async def metrics(api: Api) -> Response:
    """Prometheus' text format, over all API processes of this machine."""
    return Response(api.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
