"""The HTTP application of one API process. Imports no torch; reads no environment."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from tokenrelay import __version__
from tokenrelay.service.adapters import named_adapters
from tokenrelay.service.api.access.authentication import AuthenticationMiddleware
from tokenrelay.service.api.access.keyring import Keyring
from tokenrelay.service.api.anthropic import routes as anthropic
from tokenrelay.service.api.http.error_handlers import add_error_handlers
from tokenrelay.service.api.http.request_id import RequestIdMiddleware
from tokenrelay.service.api.http.unprefixed import UnprefixedMiddleware
from tokenrelay.service.api.ollama import models as ollama_models
from tokenrelay.service.api.ollama import routes as ollama
from tokenrelay.service.api.openai import chat, completions, embeddings, models, tokenization
from tokenrelay.service.api.openapi.document import add_openapi
from tokenrelay.service.api.operations import adapters, health, requests, usage
from tokenrelay.service.api.process import running
from tokenrelay.service.api.responses import routes as responses
from tokenrelay.service.api.served_model import ServedModel
from tokenrelay.service.metrics import ApiMetrics, new_registry
from tokenrelay.service.settings import Settings

EXPOSED_HEADERS = [  # to a page's scripts
    *("X-Request-Id", "X-Response-Id", "Idempotent-Replayed", "X-Attention-Sinks"),
    *("Retry-After", "retry-after-ms", "x-should-retry"),
    *(f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")),
]
PARTS = (
    *(chat, completions, responses, embeddings, tokenization),
    *(anthropic, ollama, ollama_models),
    *(requests, models, adapters, usage, health),
)


def create_app(settings: Settings, model: ServedModel) -> FastAPI:
    """An application that serves ``model``; its lifespan connects to ``settings.redis_url``.

    Raises ApiKeysError, and ValueError for an adapter that the settings name.
    """
    metrics = ApiMetrics(new_registry(), model.name, settings.metrics_tenants)
    keyring = Keyring(settings.api_keys_file, metrics)
    named = named_adapters(settings, model.name, model.network)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with running(settings, model, metrics, keyring, named) as process:
            app.state.api = process
            yield

    app = FastAPI(title="tokenrelay", version=__version__, lifespan=lifespan, redirect_slashes=False)
    add_error_handlers(app)
    add_openapi(app)
    for part in PARTS:
        app.include_router(part.router)
    _add_middleware(app, settings, keyring)
    return app


def _add_middleware(app: FastAPI, settings: Settings, keyring: Keyring) -> None:
    """The innermost first: what is added last sees a request first."""
    app.add_middleware(AuthenticationMiddleware, keyring=keyring, metrics_need_key=settings.metrics_need_key)
    app.add_middleware(UnprefixedMiddleware, paths=_paths())
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,  # answers what a browser asks beforehand itself: that comes without a key
            allow_origins=settings.cors_origins.split(","),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )
    app.add_middleware(RequestIdMiddleware)


def _paths() -> list[str]:
    return [route.path for part in PARTS for route in part.router.routes if isinstance(route, Route)]
