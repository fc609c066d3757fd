"""The HTTP application of one API process. Imports no torch; reads no environment."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from tokenrelay import __version__
from tokenrelay.service.api import chat, completions, health, models, requests
from tokenrelay.service.api.anthropic import routes as anthropic
from tokenrelay.service.api.error_handlers import add_error_handlers
from tokenrelay.service.api.openapi_document import add_openapi
from tokenrelay.service.api.process import running
from tokenrelay.service.api.request_id import RequestIdMiddleware
from tokenrelay.service.api.served_model import ServedModel
from tokenrelay.service.metrics import ApiMetrics, new_registry
from tokenrelay.service.settings import Settings


def create_app(settings: Settings, model: ServedModel) -> FastAPI:
    """An application that serves ``model``; its lifespan connects to ``settings.redis_url``."""
    metrics = ApiMetrics(new_registry(), model.name)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with running(settings, model, metrics) as process:
            app.state.api = process
            yield

    app = FastAPI(title="tokenrelay", version=__version__, lifespan=lifespan, redirect_slashes=False)
    app.add_middleware(RequestIdMiddleware)
    add_error_handlers(app)
    add_openapi(app)
    for part in (chat, completions, anthropic, requests, models, health):
        app.include_router(part.router)
    return app
